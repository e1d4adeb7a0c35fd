"""Steps whose loss or gradient is not finite: left out, so that neither weights nor optimizer see them, and written down.

    <stage folder>/skipped/000012.json    which step, its rows, its loss

The order of training is a pure function of the step, so a run that is started again meets the same rows again. Without a record
it would end at the same place each time; with one, whoever reads the report knows which rows to look at.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import DataError
from orchestrator.plan.batch import Batch
from orchestrator.spec.train import Skip
from orchestrator.store.files import Store
from orchestrator.store.records import Record
from orchestrator.student.job import TrainingJob
from orchestrator.tracking import names

ROWS_NAMED = 8


class SkippedStep(Record):
    """A step that was left out."""

    step: int
    """Counted from 0."""
    loss: str
    """The mean loss over the global batch, finite where only the gradient is not."""
    rows: tuple[str, ...]
    """`shard:row` of each row in a micro-batch whose loss is not finite; empty if all losses are finite."""

    def __str__(self) -> str:
        named = ", ".join(self.rows[:ROWS_NAMED]) + (" and others" if len(self.rows) > ROWS_NAMED else "")
        return f"step {self.step}: " + (
            f"the loss of rows {named} is not finite" if self.rows else "the gradient is not finite"
        )


class Skips:
    """Applies `train.on_nonfinite` to one training; made and called on every rank."""

    def __init__(self, store: Store, job: TrainingJob, board: Any, data_rank: int) -> None:
        self._store, self._job, self._board, self._data_rank = store, job, board, data_rank
        policy = job.train.on_nonfinite
        self._allowed = policy.skip if isinstance(policy, Skip) else 0
        self._steps = {skipped.step for skipped in skipped_steps(store, job.folder)}

    @property
    def count(self) -> int:
        """Steps left out so far, by earlier attempts too."""
        return len(self._steps)

    def take(self, step: int, means: torch.Tensor, losses: torch.Tensor) -> None:
        """Take in that `step` was not applied, with its `means` of `TERMS` [5], and this rank's `losses` [micro_batches].

        Raises `DataError`, naming the rows, if it may not be skipped.
        """
        rows = _rows(self._job, step, self._data_rank, losses)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        named = tuple(dict.fromkeys(row for part in parts for row in part))
        skipped = SkippedStep(step=step, loss=f"{float(means[0]):g}", rows=named)
        section = "teacher.train" if self._job.stage == "teacher" else "train"
        self._steps.add(step)
        if dist.get_rank() == 0:
            self._board.post.remote(names.stage_id(self._job.stage, self._job.key), [(step, {names.NONFINITE_LOSSES: 1.0})])
        if len(self._steps) > self._allowed:
            done = f"{len(self._steps) - 1} steps were skipped already; " if self._allowed else ""
            raise DataError(
                f"{self._job.stage}, {skipped}; {done}{section}.on_nonfinite: {{skip: {len(self._steps)}}} goes on without them"
            )
        if dist.get_rank() == 0:
            self._store.put_if_absent(_key(self._job.folder, step), skipped.model_dump_json().encode())
            self._board.warn.remote(f"{self._job.stage}: skipped {skipped}")


def skipped_steps(store: Store, folder: str) -> list[SkippedStep]:
    """The steps that the training in stage `folder` has left out, in their order."""
    found = (SkippedStep.load(store, f"{folder}/skipped/{name}") for name in store.keys(f"{folder}/skipped"))
    return sorted((skipped for skipped in found if skipped), key=lambda skipped: skipped.step)


def _rows(job: TrainingJob, step: int, data_rank: int, losses: torch.Tensor) -> list[str]:
    """The rows of this rank's micro-batches whose loss is not finite."""
    rows, micro = job.order.share(step, data_rank, job.train.data_parallel), Batch.of(job.train).micro_rows
    broken = (~losses.isfinite()).nonzero().flatten().tolist()
    return [f"{shard}:{row}" for index in broken for shard, row in rows[index * micro : (index + 1) * micro]]


def _key(folder: str, step: int) -> str:
    return f"{folder}/skipped/{step:06d}.json"
