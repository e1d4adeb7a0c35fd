"""The weights of a folder are the files and the tensors that transformers takes for them, for every reader (faults C and I)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.errors import SpecError
from orchestrator.evaluate.model import Subject
from orchestrator.models.head import last_hidden, load_head
from orchestrator.models.hub import ignored_weights, vocab_size_of, weight_files, weights_and_configuration
from orchestrator.models.share import plainly_named, read_share
from orchestrator.spec.model import TransformersTeacher
from orchestrator.store.local import LocalStore
from orchestrator.teacher.fetch import fetch_teacher
from tests.field.cases import GPT2, change_weights, save_model, stray_shard, unprefixed_gpt2

CPU = torch.device("cpu")
STRAY = "model-00001-of-00001.safetensors"


def fetched(folder: Path) -> set[str]:
    store = LocalStore(folder.parent / "store")
    return {*fetch_teacher(store, TransformersTeacher(kind="transformers", path=str(folder))).manifest.files}


def everything(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def assert_reads_as_transformers(folder: Path) -> None:
    """The head alone, and a share of all, against what transformers itself loads."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_head(folder, torch.float32, CPU)(last_hidden(model, ids)), model(input_ids=ids).logits)
    share, whole = read_share(folder, everything).state_dict(), model.state_dict()
    assert share.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in share.items())


def test_a_stray_file_of_weights_is_read_by_nobody(tmp_path: Path) -> None:
    folder = stray_shard(tmp_path / "teacher")
    right, wrong = (load_file(folder / name)["model.embed_tokens.weight"] for name in ("model.safetensors", STRAY))
    assert not torch.equal(right, wrong)
    assert_reads_as_transformers(folder)
    assert weight_files(folder) == [folder / "model.safetensors"] and ignored_weights(folder) == [STRAY]
    assert plainly_named(folder)
    assert STRAY not in fetched(folder) | {file.name for file in weights_and_configuration(folder)}
    assert Subject(str(folder), "fp32").size_bytes == (folder / "model.safetensors").stat().st_size


def test_of_several_shards_those_count_that_the_index_names(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[:5]), dict(list(weights.items())[5:])]
    names = ["first.safetensors", "second.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, metadata={"format": "pt"})
    save_file({n: torch.zeros_like(w) for n, w in weights.items()}, folder / STRAY, metadata={"format": "pt"})
    where = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_reads_as_transformers(folder)
    assert [file.name for file in weight_files(folder)] == names and ignored_weights(folder) == [STRAY]
    assert {*names} <= fetched(folder) and STRAY not in fetched(folder)
    (folder / names[1]).unlink()
    with pytest.raises(SpecError, match=r"teacher\.path: .* has no second\.safetensors, which its model\.safetensors\.index"):
        fetched(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SpecError, match=r"index\.json: no index of weights"):
        fetched(folder)


def test_names_without_the_prefix_of_the_base_model_are_found(tmp_path: Path) -> None:
    """GPT-2 as the hub stores it."""
    folder = unprefixed_gpt2(tmp_path / "teacher")
    assert "wte.weight" in load_file(folder / "model.safetensors")
    assert_reads_as_transformers(folder)
    assert plainly_named(folder)
    assert "model.safetensors" in fetched(folder)


def test_a_teacher_without_a_head_is_refused_before_it_labels(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "teacher", "gpt2", GPT2 | {"n_positions": 128})
    change_weights(
        folder, lambda weights: {n: w for n, w in weights.items() if n not in ("transformer.wte.weight", "lm_head.weight")}
    )
    with pytest.raises(SpecError, match=r"teacher\.path: .* holds no tensor transformer\.wte\.weight"):
        fetched(folder)


def test_a_tied_head_may_be_stored_under_its_own_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "teacher")
    expected = load_head(folder, torch.float32, CPU).weight
    change_weights(folder, lambda weights: {n.replace("model.embed_tokens", "lm_head"): w for n, w in weights.items()})
    assert torch.equal(load_head(folder, torch.float32, CPU).weight, expected)
    assert vocab_size_of(folder, "teacher.path") == len(expected)
