"""A teacher as people have them, from its folder to an export: a run reads what is its, and says what it left aside."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.models.generation import check_folder
from tests.field.cases import control_token, field_job, junk, unprefixed_gpt2
from tests.tiny import distill, write_job

STRAY = "model-00001-of-00001.safetensors"
PRIVATE = {"job.yaml", "plan.json"}
"""Their owner's alone: they may hold an address with a user's name."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    teacher = junk(root / "teacher")
    shutil.copytree(unprefixed_gpt2(root / "gpt2"), teacher, dirs_exist_ok=True)
    noise = {name: torch.randn_like(value) for name, value in load_file(teacher / "model.safetensors").items()}
    save_file(noise, teacher / STRAY, metadata={"format": "pt"})
    job = field_job(root, "export", teacher, control_token(root / "corpus.jsonl"), labels={"kind": "hidden"})
    distill(root / "log", "run", write_job(job, root)).assert_ok()
    return root / "stores" / "export"


def test_a_run_says_what_it_left_aside(storage: Path) -> None:
    faults = [fault["text"] for fault in json.loads((storage / "runs" / "export" / "run.json").read_text())["faults"]]
    assert any(text.startswith("teacher.path: model-00001-of-00001.safetensors in") for text in faults)
    assert any(text.startswith("160 documents contain the text of a special token") for text in faults)


def test_the_student_learnt_from_the_right_head(storage: Path) -> None:
    """Faults C and I. The head of the stray file, of noise, would be further from the teacher than no teacher at all."""
    report = json.loads((storage / "runs" / "export" / "report.json").read_text())
    assert report["student"]["kl_to_teacher_nats"] < 0.1, "the teacher is close to uniform, and so is the student"


def test_nothing_of_the_teachers_folder_is_copied_but_its_tokenizer(storage: Path) -> None:
    """Fault E."""
    names = {path.name for path in storage.rglob("*")}
    assert names.isdisjoint({"optimizer.pt", "consolidated.00.pth", STRAY})
    assert {path.name for path in storage.glob("data/*/tokenizer/*")} == {"tokenizer.json", "tokenizer_config.json"}


def test_what_others_may_read_they_can(storage: Path) -> None:
    """Fault F."""
    (storage / "new").touch()
    expected = stat.S_IMODE((storage / "new").stat().st_mode)
    shared = [path for path in storage.rglob("*") if path.is_file() and path.name not in PRIVATE]
    assert {str(path): oct(path.stat().st_mode) for path in shared if stat.S_IMODE(path.stat().st_mode) != expected} == {}


def test_the_export_is_of_one_piece(storage: Path) -> None:
    check_folder(storage / "runs" / "export" / "export")
