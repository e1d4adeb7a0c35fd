"""What a teacher actor does with the held-out rows that models are measured on; what fails there does not stop its labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.labels.answer import Answer
from orchestrator.spec.labels import SampledLabels
from orchestrator.store.claims import Claims
from orchestrator.store.heldout import CONTINUATIONS, DRAFTS, SPEED, measured_rows
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.teacher import labeller
from orchestrator.teacher.backend import Replica, TransformersBackend
from orchestrator.teacher.labeller import Labeller
from orchestrator.teacher.task import Answering, LabelTask
from tests.answers import answer_log, saved
from tests.conftest import TokenizedCorpus
from tests.unit.test_labeller import Remote
from tests.unit.test_tokens import VOCAB, tiny

ROWS = 6


class Pool:
    """One actor of the pool, without Ray, and the warnings that it puts on the board."""

    def __init__(self, work: LabelTask, warnings: list[str]) -> None:
        self.work, self.warnings = work, warnings
        self.actor = Labeller(work)

    def __call__(self, what: str, shard: int = 0) -> dict[str, Any]:
        receipts = self.actor({"kind": [what], "shard": [shard], "position": [0]})
        return {name: values[0] for name, values in receipts.items()}

    @property
    def answers(self) -> LabelLog:
        assert self.work.answering
        return self.work.answering.log.open(self.work.store)


@pytest.fixture
def pool(
    seed: int, store: LocalStore, tokenized: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Pool]:
    shutil.copytree(tokenized.store.root, store.root, dirs_exist_ok=True)
    warnings: list[str] = []
    context = SimpleNamespace(get_actor_id=lambda: "actor")
    monkeypatch.setattr(labeller, "ray", SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context))
    board = Remote()
    board.warn = SimpleNamespace(remote=warnings.append)
    work = LabelTask(
        store=store,
        data_folder=tokenized.folder,
        replica=Replica(str(saved(tiny(seed, 32), tmp_path / "teacher")), "fp32"),
        vocab_size=VOCAB,
        labels=SampledLabels(samples=5),
        log_key=LabelLog.open(store, {"name": "train"}).key,
        micro_batch=4,
        board=board,
        claims=Claims(store, "labels/k", "mine"),
        answering=Answering(answer_log(store, ROWS), (0,), speed_rows=4, continues=True),
    )
    return lambda: Pool(work, warnings)


def test_answers_speed_and_continuations_are_kept(pool: Callable[[], Pool], tokenized: TokenizedCorpus) -> None:
    teacher = pool()
    receipt = teacher("measured")
    assert receipt["heldout"] and receipt["rows"] == ROWS and not teacher.warnings
    rows = measured_rows(tokenized.store, tokenized.folder, tokenized.manifest, ROWS, 0)
    record = teacher.answers.committed(0)
    assert record
    states = [value for group in teacher.answers.read(0, record, rows) for value in group["states"]]
    own = teacher.actor._shards._teacher.answer(torch.from_numpy(rows.ids[:, :-1]).long()).states
    kept = torch.frombuffer(bytearray(b"".join(states)), dtype=torch.float32).view(own.shape)
    torch.testing.assert_close(kept, own, rtol=0, atol=1e-5)
    speed = json.loads(teacher.answers.kept(SPEED) or b"")
    assert speed["tokens_per_s"] > 0 and (speed["rows"], speed["threads"]) == (4, 1)
    assert teacher.answers.kept(CONTINUATIONS) is None, "they come last"
    teacher("continuations")
    texts = json.loads(teacher.answers.kept(CONTINUATIONS) or b"")
    assert len(texts) == 4 and all(isinstance(text, str) for text in texts)
    assert teacher.answers.kept(DRAFTS) is None, "this teacher drafts nothing"


def test_what_is_there_is_not_answered_again(pool: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool()("measured")
    teacher = pool()

    def fail(_: torch.Tensor) -> Answer:
        raise AssertionError("asked again")

    monkeypatch.setattr(teacher.actor._shards._teacher, "answer", fail)
    assert teacher("measured")["rows"] == ROWS and not teacher.warnings


def test_answers_that_fail_cost_no_label(pool: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the held-out rows alone this teacher says what is no number."""
    teacher = pool()
    sound = teacher.actor._shards._teacher.answer

    def broken(ids: torch.Tensor) -> Answer:
        said = sound(ids)
        return replace(said, states=said.states * float("nan"))

    monkeypatch.setattr(teacher.actor._shards._teacher, "answer", broken)
    receipt = teacher("measured")
    assert receipt["rows"] == 0 and receipt["heldout"] and teacher.answers.missing([0]) == [0]
    (warning,) = teacher.warnings
    assert warning.startswith("labels: the teacher's answers on held-out rows were not kept") and "states reach nan" in warning
    monkeypatch.setattr(teacher.actor._shards._teacher, "answer", sound)
    assert teacher("shard", 0)["rows"] > 0


def test_prompts_that_cannot_be_continued_cost_no_label(pool: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = pool()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no cache for this one")

    assert isinstance(teacher.actor._shards._teacher, TransformersBackend)
    monkeypatch.setattr(teacher.actor._shards._teacher.model, "generate", fail)
    assert teacher("continuations")["heldout"]
    (warning,) = teacher.warnings
    assert warning == "labels: the teacher could not continue the report's prompts: RuntimeError: no cache for this one"
    assert teacher.answers.kept(CONTINUATIONS) is None
