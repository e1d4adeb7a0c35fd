"""The training worker's side of the label log: the rows of each step, with their labels, as tensors.

Follows the log while it is being written: the next shards are awaited and decoded in a thread, and how long training
had to wait for them is counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.errors import IntegrityError
from orchestrator.labels.basis import bases_of
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Arrays, Frame
from orchestrator.labels.targets import Targets
from orchestrator.models.build import DTYPES, device
from orchestrator.models.head import load_head
from orchestrator.plan.batch import Batch
from orchestrator.plan.schedule import scheduled
from orchestrator.spec.labels import HiddenLabels
from orchestrator.store.files import Store, local_folder
from orchestrator.store.label_log import LabelLog
from orchestrator.store.shards import TokenShard, read_tokens
from orchestrator.student.job import TrainingJob

CHECK_STOP_S = 1.0
STEPS_AHEAD = 2
SHARDS_KEPT = 4


@dataclass(frozen=True)
class Mask:
    """Which targets are learnt, where not all are."""

    kept: torch.Tensor
    """[rows, seq], bool"""
    share: float
    """Of all the training's targets, those that are learnt. A loss is divided by what its batch has of them on average, so
    that a target weighs the same in whichever batch it is, and no rank needs to know another's."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Mask:
        return Mask(change(self.kept), self.share)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one worker."""

    ids: torch.Tensor
    """[rows, seq + 1]"""
    soft: Targets | None
    """tensors [rows, seq, ...]"""
    features: dict[str, torch.Tensor]
    """The teacher's inner features by name, [rows, seq, width]."""
    mask: Mask | None = None


@dataclass
class _Shard:
    tokens: TokenShard
    labels: Arrays


class Feed:
    """Micro-batches of data-parallel `rank`, step by step; without `labels`, they are awaited but not read."""

    def __init__(
        self,
        store: Store,
        job: TrainingJob,
        rank: int,
        aborted: Callable[[], str | None],
        reached: Callable[[int], None] = lambda _: None,
        labels: bool = True,
    ) -> None:
        self.waited_s = 0.0
        self._store = store
        self._job = job
        self._rank = rank
        self._aborted = aborted
        self._reached = reached
        """Told, before each step is read, how many shards of the demand training needs by then."""
        self._order = job.order
        self._micro_rows = Batch.of(job.train).micro_rows
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._log = LabelLog(store, job.soft.log_key) if job.soft else None
        self._codec = _codec(store, job) if job.soft and labels else None

    def steps(self, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, its micro-batches) from step `first` to the end of training.

        Raises what reading met, `ResumableError` if the labels will not come, and `IntegrityError` for damaged shards.
        """
        ready: queue.Queue[tuple[int, list[MicroBatch]] | BaseException] = queue.Queue(STEPS_AHEAD)
        stop = threading.Event()
        reader = threading.Thread(target=self._read, args=(first, ready, stop), name="feed", daemon=True)
        reader.start()
        try:
            for _ in range(first, self._job.steps):
                started = time.perf_counter()
                item = ready.get()
                self.waited_s += time.perf_counter() - started
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()

    def _read(self, first: int, ready: queue.Queue[object], stop: threading.Event) -> None:
        try:
            for step in range(first, self._job.steps):
                self._reached(self._order.shard_count_until(step + 1))  # before their labels are waited for
                rows = self._order.share(step, self._rank, self._job.train.data_parallel)
                parts = [rows[i : i + self._micro_rows] for i in range(0, len(rows), self._micro_rows)]
                micro = [self._gather(step, part) for part in parts]
                while not stop.is_set():
                    try:
                        ready.put((step, micro), timeout=CHECK_STOP_S)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    def _gather(self, step: int, rows: list[tuple[int, int]]) -> MicroBatch:
        shards = {shard: self._shard(shard) for shard in dict.fromkeys(s for s, _ in rows)}
        ids = torch.from_numpy(np.stack([shards[s].tokens.ids[r] for s, r in rows])).long()
        mask = self._mask([shards[s].tokens.loss_mask for s, _ in rows], rows)
        if self._codec is None:
            return MicroBatch(ids, None, {}, mask)
        assert self._job.soft is not None
        labels = {name: np.stack([shards[s].labels[name][r] for s, r in rows]) for name in shards[rows[0][0]].labels}
        temperature = scheduled(self._job.soft.objective.temperature, step, self._job.steps)
        return MicroBatch(ids, self._codec.targets(labels, temperature), self._codec.features(labels), mask)

    def _mask(self, masks: list[npt.NDArray[np.bool_] | None], rows: list[tuple[int, int]]) -> Mask | None:
        kept = [mask[row] for mask, (_, row) in zip(masks, rows, strict=True) if mask is not None]
        return Mask(torch.from_numpy(np.stack(kept)), self._job.manifest.target_share) if kept else None

    def _shard(self, shard: int) -> _Shard:
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        tokens = read_tokens(self._store, f"{self._job.data_folder}/train", self._job.manifest.train[shard])
        loaded = _Shard(tokens, self._labels(shard, tokens))
        self._shards[shard] = loaded
        if len(self._shards) > SHARDS_KEPT:
            self._shards.popitem(last=False)
        return loaded

    def _labels(self, shard: int, tokens: TokenShard) -> Arrays:
        if self._log is None:
            return {}
        record = self._log.awaited(shard, self._aborted)
        if self._codec is None:
            return {}
        try:
            return self._codec.unpack(self._log.read(shard, record, tokens))
        except ValueError as error:
            raise IntegrityError(f"label shard {shard}: {error}") from error


def _codec(store: Store, job: TrainingJob) -> Codec:
    assert job.soft is not None
    labels = job.soft.labels
    head = (
        load_head(local_folder(job.soft.teacher), DTYPES[job.soft.teacher_dtype], device(job.train.gpus_per_worker))
        if isinstance(labels, HiddenLabels)
        else None
    )
    return Codec(labels, Frame(job.vocab_size, job.manifest.seq_len, head, bases_of(LabelLog(store, job.soft.log_key))))
