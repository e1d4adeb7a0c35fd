"""A model that is written tensor by tensor is the one that transformers writes whole, and never in memory at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.models import writing
from orchestrator.models.build import build_model
from orchestrator.models.hub import INDEX, read_config, weight_files
from orchestrator.models.writing import ModelWriter
from orchestrator.spec.model import Model
from tests.contracts.test_stages import MODELS, SMALL, VOCAB

KINDS = MODELS | {
    "tied": Model(type="llama", config={**SMALL, "tie_word_embeddings": True}),
    "gpt2": Model(type="gpt2", config={"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "phi3": Model(type="phi3", config=SMALL),
}
LIMIT = 16 << 10


def write(model: PreTrainedModel, folder: Path, file_bytes: int = LIMIT) -> Path:
    folder.mkdir()
    writer = ModelWriter(model, folder, torch.float32, file_bytes)
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    for name, value in model.state_dict().items():
        if name not in tied:
            writer.add(name, value)
    writer.finish()
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in weight_files(folder) for name, value in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_writes(kind: str, tmp_path: Path, seed: int) -> None:
    model, other = (build_model(KINDS[kind], VOCAB, own, "student") for own in (seed, seed + 1))
    model.save_pretrained(tmp_path / "theirs")
    whole, parts = write(model, tmp_path / "whole", 1 << 30), write(model, tmp_path / "parts")
    theirs = tensors(tmp_path / "theirs")
    assert same(tensors(whole), theirs) and same(tensors(parts), theirs)
    assert not same(tensors(write(other, tmp_path / "other")), theirs)
    assert {path.name for path in whole.iterdir()} == {path.name for path in (tmp_path / "theirs").iterdir()}
    for folder in (whole, parts):
        assert read_config(folder, "") == read_config(tmp_path / "theirs", "")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["tied", "mixtral"])
def test_files_are_of_bounded_size(kind: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = build_model(KINDS[kind], VOCAB, seed, "student"), list[tuple[int, int]]()
    real = writing.save_file

    def save(state: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        sizes = [value.nbytes for value in state.values()]
        held.append((sum(sizes), len(sizes)))
        real(state, *args, **kwargs)

    monkeypatch.setattr(writing, "save_file", save)
    folder = write(model, tmp_path / "model")
    assert len(held) > 3, "several files"
    assert all(size <= LIMIT or count == 1 for size, count in held)
    count = len(held)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert sorted(path.name for path in folder.glob("model*")) == [*names, INDEX]
