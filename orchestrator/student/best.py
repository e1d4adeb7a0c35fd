"""Early stopping and choice of the final weights, where held-out cross entropy decides them.

    <stage folder>/best/step-000120/model/...       as a finished stage leaves a model
                                    manifest.json   with the step and its cross entropy, written last

A run that is killed goes on from a checkpoint, which says what was best by then; so the models that the kept checkpoints speak
of are kept with them, and that of a checkpoint which is being written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

from orchestrator.errors import IntegrityError
from orchestrator.store.files import Store
from orchestrator.store.records import MODEL, finished_model
from orchestrator.student.job import TrainingJob

KEPT = 2
"""Checkpoints of a training that are kept."""


class Selection:
    """The best evaluation so far, and how many have followed it; the same on every rank."""

    def __init__(self, store: Store, job: TrainingJob) -> None:
        self._store, self._job = store, job
        self._best_nats, self._best_step, self._since = math.inf, 0, 0
        self._at_checkpoints = [0] * KEPT
        """Best step by each checkpoint that is kept or being written, oldest first."""

    def take(self, done: int, heldout_ce_nats: float, save: Callable[[str, dict[str, float]], None]) -> None:
        """Take in the evaluation after `done` steps; `save` leaves the model under a stage folder, with its figures."""
        if not heldout_ce_nats < self._best_nats:
            self._since += 1
            return
        self._best_nats, self._best_step, self._since = heldout_ce_nats, done, 0
        if self._job.train.keep == "best":
            save(self._folder(done), {"step": done, "heldout_ce_nats": heldout_ce_nats})

    @property
    def exhausted(self) -> bool:
        """True once training is to stop."""
        return self._job.train.patience is not None and self._since >= self._job.train.patience

    def state(self) -> list[float]:
        """Return the state that a checkpoint keeps."""
        return [self._best_nats, self._best_step, self._since, self._at_checkpoints[-1]]

    def restore(self, state: list[float]) -> None:
        """Go on from what `state` returned for the checkpoint that training resumes from."""
        self._best_nats, self._best_step, self._since = state[0], int(state[1]), int(state[2])
        self._at_checkpoints = [int(state[3]), self._best_step]

    def begun(self) -> None:
        """Take in that a checkpoint of this state is being written; called on every rank."""
        self._at_checkpoints.append(self._best_step)

    def saved(self) -> None:
        """Take in that the checkpoint last begun is durable, and the oldest gone; called on every rank."""
        self._at_checkpoints = self._at_checkpoints[-KEPT:]

    def prune(self) -> None:
        """Remove the models but the best and those that checkpoints speak of; called on one rank."""
        kept = {_name(step) for step in (self._best_step, *self._at_checkpoints)}
        for name in self._store.keys(f"{self._job.folder}/best"):
            if name not in kept:
                self._store.remove(f"{self._job.folder}/best/{name}")

    def finish(self) -> dict[str, float]:
        """Make the best model the stage's, without its manifest; called on one rank. Returns figures for that."""
        folder = self._folder(self._best_step)
        best = finished_model(self._store, folder)
        if best is None:
            raise IntegrityError(f"{self._store.address(folder)}: the best model is gone or damaged; remove its stage's folder")
        with self._store.folder_for(f"{self._job.folder}/{MODEL}") as target:
            shutil.copytree(best.path, target, dirs_exist_ok=True)
        return {"kept_step": self._best_step}

    def _folder(self, step: int) -> str:
        return f"{self._job.folder}/best/{_name(step)}"


def _name(step: int) -> str:
    return f"step-{step:06d}"
