"""Evaluation while a training goes on: the same few held-out rows each time, on the workers that train.

Cross entropy, and the KL divergence from the teacher where it has labelled these rows. Its labels are the k most likely ids and
the mass of all others; over these k + 1 events the divergence is at most that over the vocabulary (data-processing inequality;
Cover and Thomas, Elements of Information Theory, 2.8). Nothing that training depends on is touched: no gradient is made, and no
random number drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.errors import IntegrityError
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Arrays, Frame, join
from orchestrator.losses.objective import Mixture
from orchestrator.losses.schedule import combined
from orchestrator.plan.batch import Batch
from orchestrator.spec.objective import ForwardKl
from orchestrator.store.files import Store
from orchestrator.store.heldout import watched_rows
from orchestrator.store.label_log import LabelLog
from orchestrator.student.feed import Mask, MicroBatch
from orchestrator.student.job import Evaluation, TrainingJob
from orchestrator.student.trainer import Trainer
from orchestrator.tracking import names

BY_KL = Mixture(alpha=0.0, soft_weight=1.0, divergence=combined((ForwardKl(),)))


class Evaluator:
    """The evaluations of one training, on this rank; made and called on every rank."""

    def __init__(self, trainer: Trainer, store: Store, job: TrainingJob, aborted: Callable[[], str | None]) -> None:
        self._trainer, self._store, self._job, self._aborted = trainer, store, job, aborted
        self._micro_batches: list[MicroBatch] | None = None

    def due(self, done: int) -> bool:
        """Return whether the model is to be evaluated after `done` steps."""
        evaluation = self._job.evaluation
        return evaluation is not None and (done % evaluation.every == 0 or done == self._job.steps)

    def evaluate(self) -> dict[str, float]:
        """The metrics of the model as it is now, the same on every rank.

        Raises `ResumableError` if the teacher's labels will not come, and `IntegrityError` for damaged ones.
        """
        evaluation = self._job.evaluation
        assert evaluation is not None
        if self._micro_batches is None:
            self._micro_batches = _own_share(self._store, self._job, evaluation, self._trainer.data_rank, self._aborted)
        mixture = BY_KL if evaluation.log else Mixture()
        sums = torch.zeros(3, dtype=torch.float64, device=self._trainer.engine.device)
        sums[:2] = self._trainer.measure(mixture, self._micro_batches)
        sums[2] = sum(int(micro.mask.kept.sum()) for micro in self._micro_batches if micro.mask)
        dist.all_reduce(sums)
        dist.broadcast(sums, src=0)  # ranks that stop, or keep a model, by these must not differ in a bit
        ce, kl, count = sums.tolist()
        found = {names.HELDOUT_CE_NATS: ce / count}
        return found | {names.HELDOUT_KL_NATS: kl / count} if evaluation.log else found


def _own_share(
    store: Store, job: TrainingJob, evaluation: Evaluation, rank: int, aborted: Callable[[], str | None]
) -> list[MicroBatch]:
    """The rows of data-parallel `rank`: as many as of any other, since all go through the model together.

    Those that fill up the last shares are counted nowhere.
    """
    tokens = watched_rows(store, job.data_folder, job.manifest, evaluation.rows)
    counted, there = tokens.counted(), len(tokens.row_ids)
    each = -(-there // job.train.data_parallel)
    own = np.arange(rank * each, (rank + 1) * each)
    rows = own.clip(max=there - 1)
    kept = counted[rows] & (own < there)[:, None]
    codec, labels = None, Arrays()
    if evaluation.log:
        log, codec = (
            LabelLog(store, evaluation.log.key),
            Codec(evaluation.log.labels, Frame(job.vocab_size, job.manifest.seq_len)),
        )
        try:
            labels = join([codec.unpack(group) for group in log.read(0, log.awaited(0, aborted), tokens)])
        except ValueError as error:
            raise IntegrityError(f"label log {log.key}, of held-out rows: {error}") from error
    found: list[MicroBatch] = []
    for part in np.split(np.arange(each), range(Batch.of(job.train).micro_rows, each, Batch.of(job.train).micro_rows)):
        soft = codec.targets({name: values[rows[part]] for name, values in labels.items()}, 1.0) if codec else None
        ids = torch.from_numpy(tokens.ids[rows[part]]).long()
        found.append(MicroBatch(ids, soft, {}, Mask(torch.from_numpy(kept[part]), 1.0)))
    return found
