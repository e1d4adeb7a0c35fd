"""The training worker's side of the label log: the rows of each step, with their labels, as tensors.

Follows the log while it is being written. One thread awaits the labels of the next steps and asks for their row groups, which
another process reads and decodes (`student/decoder.py`); a second thread makes tensors of them. How long training had to wait
is counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from orchestrator.labels.basis import bases_of
from orchestrator.labels.codec import Codec
from orchestrator.labels.groups import Group, GroupSource
from orchestrator.labels.layout import Frame, Shape
from orchestrator.labels.targets import Targets
from orchestrator.models.build import DTYPES, device
from orchestrator.models.head import load_head
from orchestrator.plan.batch import Batch
from orchestrator.plan.order import Row
from orchestrator.plan.schedule import scheduled
from orchestrator.spec.labels import HiddenLabels
from orchestrator.store.files import Store, local_folder
from orchestrator.store.label_log import LabelLog
from orchestrator.student.decoder import Decoder
from orchestrator.student.job import TrainingJob

CHECK_STOP_S = 1.0
STEPS_REQUESTED, STEPS_READY = 4, 2
"""Number of steps ahead of training for which row groups are requested, and for which tensors are made. A group serves several
steps, so the groups of new places all come due at once; they are decoded while these steps are trained."""


@dataclass(frozen=True)
class Mask:
    """Which targets are learnt, where not all are."""

    kept: torch.Tensor
    """[rows, seq], bool"""
    share: float
    """Share of all the training's targets that are learnt. A loss is divided by the number of them that a batch has on average,
    so that a target weighs the same in whichever batch it is, and no rank needs to know another's."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Mask:
        return Mask(change(self.kept), self.share)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one worker."""

    ids: torch.Tensor
    """[rows, seq + 1]; int32 while it waits, int64 on its device."""
    soft: Targets | None
    """tensors [rows, seq, ...]"""
    features: dict[str, torch.Tensor]
    """The teacher's inner features by name, [rows, seq, width]."""
    mask: Mask | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same with `change` applied to every tensor that has an entry per row."""
        return MicroBatch(
            change(self.ids),
            None if self.soft is None else self.soft.map(change),
            {name: change(values) for name, values in self.features.items()},
            None if self.mask is None else self.mask.map(change),
        )

    def on(self, place: torch.device) -> MicroBatch:
        """On a device, where ids become the int64 that torch indexes with.

        The mask stays: to learn which targets are learnt must not wait for a device.
        """
        moved = self.map(lambda t: _wide(t.to(place, non_blocking=True)))
        return replace(moved, mask=self.mask)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.long() if values.dtype == torch.int32 else values


def _narrow(values: torch.Tensor) -> torch.Tensor:
    return values.int() if values.dtype == torch.int64 else values


T = TypeVar("T")
Passing = queue.Queue[T | BaseException]
"""From one thread to the next: items, or what ended the thread."""


class _Place(NamedTuple):
    """A row of a step: its row group, and which row of that."""

    shard: int
    group: int
    row: int


class _Requested(NamedTuple):
    """A step whose row groups have been asked for."""

    step: int
    places: list[_Place]
    groups: dict[tuple[int, int], Future[Group]]


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
        self._log = LabelLog(store, job.soft.log_key) if job.soft else None
        self._codec = _codec(store, job) if job.soft and labels else None
        self._pinned = device(job.train.gpus_per_worker).type == "cuda"
        self._demand = self._order.shards_until(job.steps)
        self._awaited = np.zeros(len(job.manifest.train), np.bool_)
        """For each shard, whether its labels are known to be there."""

    def steps(self, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, its micro-batches) from step `first` to the end of training.

        Raises what reading met, `ResumableError` if the labels will not come, and `IntegrityError` for damaged shards.
        """
        requested: Passing[_Requested] = queue.Queue(STEPS_REQUESTED)
        ready: Passing[Step] = queue.Queue(STEPS_READY)
        stop = threading.Event()
        decoder = Decoder(self._source())
        for work in (
            lambda: self._request(first, decoder, requested, stop),
            lambda: self._make(requested, ready, stop),
        ):
            threading.Thread(target=work, name="feed", daemon=True).start()
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
            decoder.close()

    def _source(self) -> GroupSource:
        job = self._job
        shape = Shape(job.vocab_size, job.manifest.seq_len)
        if job.soft is None or self._codec is None:
            return GroupSource(self._store, job.manifest.train, None, None, shape)
        return GroupSource(self._store, job.manifest.train, job.soft.log_key, job.soft.labels, shape)

    def _request(self, first: int, decoder: Decoder, requested: Passing[_Requested], stop: threading.Event) -> None:
        """Ask for the row groups of one step after another; each once, as long as every step needs it."""
        try:
            groups: dict[tuple[int, int], Future[Group]] = {}
            known = self._order.shard_count_until(first)
            for step in range(first, self._job.steps):
                count = self._order.shard_count_until(step + 1)
                self._reached(count)  # before their labels are waited for
                places = [self._place(row) for row in self._order.share(step, self._rank, self._job.train.data_parallel)]
                # Not only those of this rank: who enters a step waits in collectives for all others, and a collective that
                # waits for a teacher runs into its timeout. So every rank waits here for the labels of the whole step.
                self._await([*self._demand[known:count], *(place.shard for place in places)])
                known = max(known, count)
                groups = {
                    key: groups.get(key) or decoder.group(*key) for key in dict.fromkeys((p.shard, p.group) for p in places)
                }
                if not _put(requested, _Requested(step, places, groups), stop):
                    return
        except BaseException as error:
            _put(requested, error, stop)

    def _place(self, row: Row) -> _Place:
        return _Place(row.shard, *divmod(row.row, self._job.manifest.group_rows))

    def _await(self, shards: list[int]) -> None:
        """Wait until all `shards` are labelled."""
        if self._log is None:
            return
        for shard in shards:
            if not self._awaited[shard]:
                self._log.awaited(shard, self._aborted)
                self._awaited[shard] = True

    def _make(self, requested: Passing[_Requested], ready: Passing[Step], stop: threading.Event) -> None:
        """Make tensors of one step after another."""
        try:
            while not stop.is_set():
                item = _get(requested, stop)
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                groups = {key: future.result() for key, future in item.groups.items()}
                parts = [item.places[i : i + self._micro_rows] for i in range(0, len(item.places), self._micro_rows)]
                micro = [self._gather(item.step, part, groups) for part in parts]
                if not _put(ready, (item.step, micro), stop):
                    return
        except BaseException as error:
            _put(ready, error, stop)

    def _gather(self, step: int, places: list[_Place], groups: dict[tuple[int, int], Group]) -> MicroBatch:
        found = [(groups[p.shard, p.group], p.row) for p in places]
        ids = torch.from_numpy(np.stack([group.tokens.ids[row] for group, row in found]))
        masks = [group.tokens.loss_mask[row] for group, row in found if group.tokens.loss_mask is not None]
        mask = Mask(torch.from_numpy(np.stack(masks)), self._job.manifest.target_share) if masks else None
        micro = MicroBatch(ids, None, {}, mask)
        if self._codec is not None:
            assert self._job.soft is not None
            labels = {name: np.stack([group.labels[name][row] for group, row in found]) for name in found[0][0].labels}
            temperature = scheduled(self._job.soft.objective.temperature, step, self._job.steps)
            micro = replace(micro, soft=self._codec.targets(labels, temperature), features=self._codec.features(labels))
        micro = micro.map(_narrow)
        return micro.map(torch.Tensor.pin_memory) if self._pinned else micro


Step = tuple[int, list[MicroBatch]]


def _put(queue_: Passing[T], item: T | BaseException, stop: threading.Event) -> bool:
    """Pass `item` on; return whether that succeeded before `stop` was set."""
    while not stop.is_set():
        try:
            queue_.put(item, timeout=CHECK_STOP_S)
            return True
        except queue.Full:
            continue
    return False


def _get(queue_: Passing[T], stop: threading.Event) -> T | BaseException | None:
    """The next item; None once `stop` is set."""
    while not stop.is_set():
        try:
            return queue_.get(timeout=CHECK_STOP_S)
        except queue.Empty:
            continue
    return None


def _codec(store: Store, job: TrainingJob) -> Codec:
    assert job.soft is not None
    labels = job.soft.labels
    head = (
        load_head(local_folder(job.soft.teacher), DTYPES[job.soft.teacher_dtype], device(job.train.gpus_per_worker))
        if isinstance(labels, HiddenLabels)
        else None
    )
    return Codec(labels, Frame(job.vocab_size, job.manifest.seq_len, head, bases_of(LabelLog(store, job.soft.log_key))))
