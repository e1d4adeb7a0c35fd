"""Checkpoints that students start from: what is wrong with one is said in a line; what changes a student changes its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model, load_model
from orchestrator.models.share import plainly_named, read_share
from orchestrator.spec.job import Job
from orchestrator.spec.model import CheckpointStudent, Model, UpcycledStudent
from orchestrator.store.interface import unguarded
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ModelFolder, ModelManifest, describe_folder
from orchestrator.student.initial import Origin, _made, _make_task
from orchestrator.student.preflight import check_models

VOCAB = 67
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer of a few ids."""
    build_model(Model(config=SMALL), VOCAB, 0, "student").save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    return tmp_path / "checkpoint"


def origin(folder: Path, tmp_path: Path, student: Any) -> Origin:
    """Of a student whose teacher is that very checkpoint, copied."""
    teacher = tmp_path / "teacher"
    if not teacher.exists():
        shutil.copytree(folder, teacher)
    manifest = ModelManifest(fingerprint="x", files=describe_folder(teacher), vocab_size=VOCAB)
    return Origin(LocalStore(tmp_path / "store"), student, ModelFolder(str(teacher), manifest), 0, "tokens", None)  # type: ignore[arg-type]


def rewrite(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FAULTS: dict[str, tuple[Any, str]] = {
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no decoder": (lambda f: rewrite(f, model_type="lama"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no .safetensors weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "nothing": (shutil.rmtree, "is not a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_refused_before_anything_costs_time(folder: Path, fault: str) -> None:
    student = CheckpointStudent(kind="checkpoint", path=str(folder))
    check_models(Job(name="a", student=student), VOCAB)
    harm, message = FAULTS[fault]
    harm(folder)
    with pytest.raises(SpecError, match=r"^student\.path: ") as caught:
        check_models(Job(name="a", student=student), VOCAB)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_those_of_the_configuration_are_refused(folder: Path) -> None:
    load_model(folder, "fp32", torch.device("cpu"))
    save_file({"foo": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpecError, match=r"its weights are not those of its config\.json"):
        load_model(folder, "fp32", torch.device("cpu"))
    (folder / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(SpecError, match="cannot be read as a causal language model"):
        load_model(folder, "fp32", torch.device("cpu"))


def test_another_tokenizer_or_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    student = CheckpointStudent(kind="checkpoint", path=str(folder))
    assert origin(folder, tmp_path, student).folder == folder
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 0}}}))
    with pytest.raises(SpecError, match="has other ids for its tokens than the teacher's"):
        _ = origin(folder, tmp_path, student).folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SpecError, match=r"has no tokenizer\.json"):
        _ = origin(folder, tmp_path, student).folder


@pytest.mark.parametrize("ids", [VOCAB - 3, VOCAB + 5])
def test_a_vocabulary_padded_to_another_size_needs_a_word(folder: Path, tmp_path: Path, ids: int) -> None:
    exact = CheckpointStudent(kind="checkpoint", path=str(folder))
    aligned = exact.model_copy(update={"vocab_alignment": "truncate_padding"})
    assert origin(folder, tmp_path, exact).folder == folder, "the teacher is a copy of what this is before"
    build_model(Model(config=SMALL), ids, 0, "student").save_pretrained(folder)
    with pytest.raises(
        SpecError, match=f"has {ids} ids, the teacher's {VOCAB}, the tokenizer gives 2; if they differ in padding"
    ):
        _ = origin(folder, tmp_path, exact).folder
    assert origin(folder, tmp_path, aligned).folder == folder

    before, made = load_model(folder, "fp32", torch.device("cpu")), _made(origin(folder, tmp_path, aligned))
    window = torch.arange(12)[None] % min(ids, VOCAB)
    with torch.no_grad():
        expected, found = before(input_ids=window).logits, made(input_ids=window).logits
    kept = min(ids, VOCAB)
    assert found.shape[-1] == made.config.vocab_size == VOCAB
    torch.testing.assert_close(found[..., :kept], expected[..., :kept])
    assert not found[..., kept:].any()

    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": kept}]}))
    with pytest.raises(SpecError, match=f"the tokenizer gives {kept + 1};"):
        _ = origin(folder, tmp_path, aligned).folder


def test_first_weights_can_be_read_one_by_one(folder: Path, tmp_path: Path) -> None:
    brought = origin(folder, tmp_path, CheckpointStudent(kind="checkpoint", path=str(folder)))
    mixed = origin(folder, tmp_path, UpcycledStudent(kind="upcycled", path=str(folder)))
    for made in (brought, mixed):
        _make_task._function(made, unguarded)
        found = made.store.path(f"{made.stage}/model")
        assert plainly_named(found)
        whole = load_model(found, "fp32", torch.device("cpu"))
        share = read_share(found, lambda model: {name for name, _ in model.named_parameters()})
        assert all(torch.equal(value, share.state_dict()[name]) for name, value in whole.state_dict().items())
        copied = made is brought
        assert ((found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()) == copied


def test_the_name_of_the_first_weights_holds_all_that_makes_them(folder: Path, tmp_path: Path) -> None:
    def key(**changed: Any) -> str:
        return origin(folder, tmp_path, UpcycledStudent(kind="upcycled", path=str(folder), **changed)).key

    names = {key(), key(experts_per_token=1), key(experts=4), key(noise=0.1)}
    reseeded = replace(origin(folder, tmp_path, UpcycledStudent(kind="upcycled", path=str(folder))), seed=1).key
    rewrite(folder, rope_theta=5.0)
    assert len({*names, reseeded, key()}) == 6
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert key() == origin(moved, tmp_path, UpcycledStudent(kind="upcycled", path=str(moved))).key, "where it lies is no part"
    continued = CheckpointStudent(kind="checkpoint", path=str(folder))
    one, two = origin(folder, tmp_path, continued), replace(origin(folder, tmp_path, continued), seed=1)
    assert one.key == two.key, "no seed makes a checkpoint"
