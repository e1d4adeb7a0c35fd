"""How long a training is, asked for in steps or in passes over the rows; and what evaluation changes of its identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.plan.explain import explain
from orchestrator.plan.length import progress_figures, with_steps
from orchestrator.plan.make import make_plan
from orchestrator.spec.job import Job
from orchestrator.spec.labels import TopkLabels
from orchestrator.spec.load import load_job, resolved_yaml
from orchestrator.spec.train import Train
from orchestrator.store.heldout import HeldoutLog
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import ShardPages
from orchestrator.student.job import Evaluation, TrainingJob


def loaded(folder: Path, text: str) -> Job:
    file = folder / "job.yaml"
    file.write_text(text)
    return load_job(file)


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [(1.0, 100, 10, 10), (1.0, 101, 10, 11), (3.0, 36, 8, 14), (0.5, 36, 8, 3), (1.1, 10, 1, 11), (0.001, 36, 8, 1)],
)
def test_epochs_are_steps_once_the_rows_are_counted(epochs: float, rows: int, batch: int, steps: int) -> None:
    asked = Train(epochs=epochs, global_batch=batch, micro_batch=1, warmup_steps=0)
    assert asked.steps is None
    found = with_steps(asked, rows, "train")
    assert (found.steps, found.epochs) == (steps, None)
    assert found == Train(steps=steps, global_batch=batch, micro_batch=1, warmup_steps=0)
    assert with_steps(found, 7 * rows, "train") is found, "steps that were asked for are those"


def test_a_warm_up_longer_than_the_epochs_is_named() -> None:
    with pytest.raises(SpecError) as caught:
        with_steps(Train(epochs=2.0, global_batch=8), 36, "teacher.train")
    assert str(caught.value) == (
        "teacher.train.warmup_steps: 10 exceeds the 9 steps that teacher.train.epochs 2 is (36 rows, 8 a step)"
    )


@pytest.mark.parametrize(
    ("text", "length"),
    {"": 100, "train: {steps: 7, warmup_steps: 2}": 7, "train: {epochs: 2}": 2.0, "train: {epochs: 0.25}": 0.25}.items(),
)
def test_what_was_asked_for_comes_back_from_the_resolved_job(tmp_path: Path, text: str, length: float) -> None:
    job = loaded(tmp_path, f"name: a\n{text}\n")
    assert loaded(tmp_path, resolved_yaml(job)) == job
    assert (job.train.steps or job.train.epochs) == length


def test_a_plan_tells_how_much_is_read_or_when_that_is_known(tmp_path: Path) -> None:
    known = explain(make_plan(loaded(tmp_path, "name: a\ntrain: {steps: 20, global_batch: 8}\ndata: {seq_len: 64}\n")))
    assert "length    20 steps = 160 rows seen, 10,240 tokens" in known
    asked = make_plan(loaded(tmp_path, "name: a\ntrain: {epochs: 1.5}\n"))
    assert asked.label_rows is asked.label_bytes_at_most is None
    assert "length    1.5 epochs; steps, rows and tokens are known once there are token shards" in explain(asked)
    assert "as many rows as the student's epochs have" in explain(asked)


def test_figures_of_what_was_read() -> None:
    found = progress_figures(9, Train(steps=9, global_batch=8, warmup_steps=0), rows=36, seq_len=64)
    assert found == {"rows_seen": 72, "rows_there": 36, "passes": 2.0, "tokens_seen": 72 * 64}


def training(evaluation: Evaluation | None, **train: Any) -> TrainingJob:
    manifest = TokenManifest.without_corpus(64, 512, ShardPages.of_rows([36]))
    model = Job(name="a").student.model  # type: ignore[union-attr]
    train = {"warmup_steps": 1} | train
    return TrainingJob("student", model, 512, Train(**train), 0, "", manifest, None, evaluation=evaluation)


def test_evaluation_changes_the_identity_of_a_training_where_it_changes_its_weights() -> None:
    plain, watch = training(None), Evaluation(10, 16, None)
    log = HeldoutLog("key", TopkLabels(kind="topk", k=8), 16)
    assert training(watch).key == plain.key, "a training that is only looked at is the same"
    asked = Train(epochs=100 * 16 / 36, warmup_steps=1)
    assert replace(plain, train=with_steps(asked, 36, "train")).key == plain.key, "however its length was asked for"
    others = [training(watch, keep="best"), training(watch, patience=2), training(replace(watch, every=5), keep="best")]
    assert len({plain.key, *(other.key for other in others)}) == 4
    assert training(replace(watch, log=log), keep="best").key == others[0].key, "the teacher's word does not decide"
