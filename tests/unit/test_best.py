"""Which model is kept, and until when training goes on; the same wherever it is broken off, from either checkpoint."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MODEL, finish_model
from orchestrator.student.best import Selection
from orchestrator.student.job import Evaluation, TrainingJob
from tests.unit.test_length import training

CURVE = [5.0, 4.0, 4.5, 4.2, 3.9, 3.9, 3.7, 3.8, 3.9, 3.6, 3.7, 3.8, 4.0, 4.1, 4.2]
"""Held-out cross entropy after each step; two in a row are often no better, three never before the tenth."""
CHECKPOINT_EVERY, KEPT = 3, 2
Checkpoint = tuple[int, list[float]]


class Course:
    """A training of which nothing is there but its evaluations."""

    def __init__(self, store: LocalStore, job: TrainingJob) -> None:
        self.store, self.job = store, job
        self.checkpoints: list[Checkpoint] = [(0, Selection(store, job).state())]
        self.written: list[Checkpoint] = []
        """The checkpoint that is being written, if any."""

    def go_on(self, since: Checkpoint, until: int = len(CURVE)) -> tuple[int, dict[str, float]]:
        """Train from a checkpoint to step `until` or the end; the step reached and, at the end, what is said of the model."""
        selection, self.written = Selection(self.store, self.job), []
        selection.restore(since[1])
        self.checkpoints = [c for c in self.checkpoints if c[0] <= since[0]]
        for done in range(since[0] + 1, until + 1):
            selection.take(done, CURVE[done - 1], self.save)
            selection.prune()
            if self.written:  # what was begun after the step before is durable now
                self.checkpoints, self.written = [*self.checkpoints, *self.written][-KEPT:], []
                selection.saved()
                selection.prune()
            assert len(self.bests()) <= 1 + KEPT, "one for each checkpoint, and the best"
            if selection.exhausted:
                break
            if done % CHECKPOINT_EVERY == 0 and done < len(CURVE):
                self.written = [(done, selection.state())]
                selection.begun()
        else:
            if until < len(CURVE):
                return until, {}
        return done, selection.finish()

    def save(self, folder: str, figures: dict[str, float]) -> None:
        with self.store.folder_for(f"{folder}/{MODEL}") as model:
            (model / "weights").write_text(f"{figures['step']:.0f}")
        finish_model(self.store, folder, 512, figures)

    @property
    def weights(self) -> str:
        return self.store.read(f"{self.job.folder}/{MODEL}/weights").decode()

    def bests(self) -> list[int]:
        return [int(name.removeprefix("step-")) for name in self.store.keys(f"{self.job.folder}/best")]


def course(store: LocalStore, **train: Any) -> Course:
    return Course(store, training(Evaluation(1, 16, None), **({"keep": "best"} | train)))


def test_training_ends_after_so_many_evaluations_without_a_better_one(store: LocalStore) -> None:
    for patience, end in {1: 3, 2: 4, 3: 13, 5: 15, None: 15}.items():
        steps, figures = course(store, patience=patience).go_on((0, [float("inf"), 0, 0, 0]))
        best = min(range(steps), key=lambda step: CURVE[step]) + 1
        assert (steps, figures) == (end, {"kept_step": best}), patience


@pytest.mark.parametrize("damaged", [False, True])
def test_wherever_it_is_broken_off_the_same_model_is_kept(store: LocalStore, damaged: bool) -> None:
    """With `damaged`, the newest checkpoint is lost too, and the one before is gone on from."""
    for first, second in itertools.combinations(range(1, 13), 2):
        broken = course(store, patience=3)
        start = broken.checkpoints[-1]
        for until in (first, second):
            broken.go_on(start, until)
            start = broken.checkpoints[-2 if damaged and len(broken.checkpoints) > 1 else -1]
        assert broken.go_on(start) == (13, {"kept_step": 10}), (first, second)
        assert broken.weights == "10"
        store.remove(broken.job.folder)


def test_few_models_lie_about(store: LocalStore) -> None:
    whole = course(store)
    whole.go_on(whole.checkpoints[-1], until=10)
    assert whole.bests() == [5, 7, 10], "the best so far, the best of the checkpoint after 6 steps, and of that after 9"
    plain = course(store, keep="last", patience=3)
    assert plain.go_on(plain.checkpoints[-1], until=9) == (9, {})
    assert plain.bests() == [], "where the last model is kept, no other is written"


def test_a_kept_model_that_is_damaged_is_not_handed_on(store: LocalStore) -> None:
    broken = course(store)
    broken.go_on(broken.checkpoints[-1], until=13)
    (store.path(f"{broken.job.folder}/best/step-000010/{MODEL}") / "weights").write_text("others")
    with pytest.raises(IntegrityError, match="the best model is gone or damaged"):
        broken.go_on(broken.checkpoints[-1])
