"""Training checkpoints: complete or invisible, checked before a byte of them is unpickled.

    <stage folder>/checkpoints/step-000050/engine/...   what DeepSpeed writes, every rank its part
                                           manifest.json   sizes and hashes, the last part before all is published
                              /.tmp-parts-.../00003     what rank 3 has written, while the others are still writing

Training goes on while its state is copied to host memory; only its next update of the weights waits for that. Each rank
copies, writes, syncs and hashes its files in a thread, and reports them through the storage; the thread of rank 0 waits for all
reports, writes the manifest and publishes. No collective is involved, so that a slow disk holds up nobody's step.

The newest checkpoint that is intact is the one to resume from; a damaged one is passed over with a warning. As many ranks as
wrote it load it as it is, bit for bit; for another number it is converted first (`student/universal.py`).
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import EnvironmentFault, IntegrityError
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.store.files import UNFINISHED, Part, StillOurs, Store, storage_faults, unguarded
from orchestrator.store.records import MANIFEST, FileRecord, Record
from orchestrator.student.best import KEPT, Selection
from orchestrator.student.job import CHECKPOINT_PREFIX, checkpoint_steps
from orchestrator.student.ranks import everywhere, from_first_rank
from orchestrator.student.snapshot import HostMemory, before_update, checkpoint_engine, snapshot, write_snapshot
from orchestrator.student.universal import check_elastic, drop_universal, load_universal, make_universal, universal_key

LOOK_S = 0.1
"""Between two looks for the reports of other ranks."""
_TAG = "engine"
log = logging.getLogger(__name__)


class CheckpointManifest(Record):
    step: int
    """Optimizer steps done."""
    ranks: tuple[dict[str, FileRecord], ...]
    """The files that each rank wrote. The rest of the layout, `train.parallel`, is in the name of the stage folder."""

    @property
    def files(self) -> dict[str, FileRecord]:
        return {name: record for written in self.ranks for name, record in written.items()}

    def share(self, rank: int, world: int) -> dict[str, FileRecord]:
        """The files that `rank` of `world` verifies: those that it wrote, where as many ranks resume."""
        return {name: record for written in self.ranks[rank::world] for name, record in written.items()}


class PartReport(Record):
    """The files that one rank has written, for rank 0 to publish."""

    folder: Path
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has become durable."""

    at_s: float
    """When its state was that of the training, in seconds since 1970."""
    stalled_s: float
    """Seconds that training stood still for it on this rank."""


class CheckpointWriter:
    """Writes the checkpoints of one training beside it, one at a time; made and called on every rank.

    `still_ours` is asked before a checkpoint is published. Between two checkpoints the copy of the last one stays in host
    memory, where the next one finds its room.
    """

    def __init__(
        self,
        engine: Any,
        schedule: ObjectiveSchedule,
        store: Store,
        folder: str,
        selection: Selection | None = None,
        still_ours: StillOurs = unguarded,
    ) -> None:
        self._engine, self._schedule, self._selection = engine, schedule, selection
        self._store, self._checkpoints, self._still_ours = store, f"{folder}/checkpoints", still_ours
        self._memory, self._copied = HostMemory(), threading.Event()
        self._running: _Task | None = None
        self._begun_at = self._stalled_s = 0.0
        self._saved: Saved | None = None
        self._attempt: str = from_first_rank(lambda: uuid.uuid4().hex[:12])
        """Tells the reports of this writer's ranks from those of a run that was killed."""

    def start(self, step: int) -> None:
        """Begin to save the state after `step` optimizer steps.

        Waits until an earlier checkpoint is written, and raises what `finish` does.
        """
        started = time.perf_counter()
        self.finish()
        client: dict[str, Any] = {"objective": self._schedule.state()}
        if self._selection:
            client["selection"] = self._selection.state()
            self._selection.begun()
        files = snapshot(self._engine, self._memory, _TAG, client)
        self._copied.clear()
        self._hook = before_update(self._engine, self._wait_for_the_copy)
        self._begun_at = time.time()
        self._running = _Task(partial(self._write, step, files))
        self._stalled_s = time.perf_counter() - started

    def settled(self) -> Saved | None:
        """The checkpoint that has become durable since the last call, if any; never waits. Raises what `finish` does."""
        if self._running and self._running.done:
            self.finish()
        saved, self._saved = self._saved, None
        return saved

    def finish(self) -> None:
        """Wait until what this rank has begun to save is written, on rank 0 until the checkpoint as a whole is durable.

        Raises `EnvironmentFault` for a storage that is full or gone, and `LockedError` if the training is another run's now.
        """
        if self._running is None:
            return
        running, self._running = self._running, None
        running.result()
        self._hook.remove()
        self._saved = Saved(self._begun_at, self._stalled_s)
        if self._selection:
            self._selection.saved()
            if dist.get_rank() == 0:
                self._selection.prune()

    def save_now(self, step: int) -> None:
        """Save the state after `step` optimizer steps and return when it is durable; raises what `finish` does."""
        self.start(step)
        self.finish()
        dist.barrier()

    def _wait_for_the_copy(self) -> None:
        started = time.perf_counter()
        self._copied.wait()
        self._stalled_s += time.perf_counter() - started

    def _write(self, step: int, files: dict[str, Any]) -> None:
        try:
            self._memory.fill()
        finally:
            self._copied.set()
        key = f"{self._checkpoints}/{_name(step)}"
        with self._store.part_of(key) as own, _failed_writes(own.folder):
            write_snapshot(files, own.folder)
            self._still_ours()
        reports = f"{self._checkpoints}/{UNFINISHED}-parts-{self._attempt}-{step}"
        PartReport(folder=own.folder, files=own.files).save(self._store, f"{reports}/{dist.get_rank():05d}")
        if dist.get_rank() == 0:
            self._publish(step, key, reports)

    def _publish(self, step: int, key: str, reports: str) -> None:
        parts = [self._report(f"{reports}/{rank:05d}") for rank in range(dist.get_world_size())]
        with self._store.part_of(key) as last:
            manifest = CheckpointManifest(step=step, ranks=tuple(part.files for part in parts))
            (last.folder / MANIFEST).write_text(manifest.model_dump_json())
        self._store.publish(key, [*parts, last], self._still_ours)
        self._store.remove(reports)
        for old in _steps(self._store, self._checkpoints)[:-KEPT]:
            self._store.remove(f"{self._checkpoints}/{old}")
        drop_universal(self._store, self._checkpoints)

    def _report(self, key: str) -> Part:
        while True:
            report = PartReport.load(self._store, key)
            if report is not None:
                return Part(report.folder, report.files)
            time.sleep(LOOK_S)


@dataclass
class _Task:
    """Work in a thread of its own, which does not keep the process from ending."""

    work: Callable[[], None]
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait for the work, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self._error = error


def save_checkpoint(
    engine: Any,
    schedule: ObjectiveSchedule,
    store: Store,
    folder: str,
    step: int,
    selection: Selection | None = None,
    still_ours: StillOurs = unguarded,
) -> None:
    """Save the state after `step` optimizer steps and return when it is durable; called on every rank.

    A training that has a `CheckpointWriter` calls that one's `save_now`.
    """
    CheckpointWriter(engine, schedule, store, folder, selection, still_ours).save_now(step)


def restore_checkpoint(
    engine: Any,
    schedule: ObjectiveSchedule,
    store: Store,
    folder: str,
    warn: Callable[[str], object] = log.warning,
    selection: Selection | None = None,
) -> int:
    """Load the newest intact checkpoint; returns the optimizer steps done, 0 without one. `warn` is told of damaged ones.

    Called on every rank. Raises `SpecError` if it is of another number of ranks and the parallel strategy does not allow for
    that.
    """
    checkpoints = f"{folder}/checkpoints"
    from_first_rank(lambda: store.sweep(checkpoints))
    manifest = _newest_intact(store, checkpoints, warn)
    if manifest is None:
        return 0
    _allow_deepspeed_types()
    try:
        client = _load(engine, store, checkpoints, manifest)
    except pickle.UnpicklingError as error:
        where = store.address(f"{checkpoints}/{_name(manifest.step)}")
        raise IntegrityError(f"checkpoint {where} holds what no checkpoint of ours holds: {error}") from error
    schedule.restore(client["objective"])
    if selection:
        selection.restore(client["selection"])
    return manifest.step


def drop_checkpoints(store: Store, folder: str) -> None:
    """Remove all checkpoints of a finished training."""
    store.remove(f"{folder}/checkpoints")


def _load(engine: Any, store: Store, checkpoints: str, manifest: CheckpointManifest) -> dict[str, Any]:
    name, world = _name(manifest.step), dist.get_world_size()
    key = f"{checkpoints}/{name}"
    if len(manifest.ranks) != world:
        check_elastic(engine, len(manifest.ranks))
    # Without ZeRO every rank has the whole state, whatever their number.
    if len(manifest.ranks) == world or engine.zero_optimization_stage() == 0:
        fetched = _Fetched(store, key, manifest.files, engine.checkpoint_engine)
        with checkpoint_engine(engine, fetched):
            client = engine.load_checkpoint(str(fetched.root), tag=_TAG)[1]
    else:
        log.info("converting a checkpoint of %d ranks for %d: %s", len(manifest.ranks), world, store.address(key))
        with _failed_writes(store.address(key)):
            make_universal(store, checkpoints, name, manifest.files, _TAG)
        whole = universal_key(checkpoints, name)
        client = load_universal(engine, store.local(whole), _TAG)
        dist.barrier()
        store.forget(whole)
    dist.barrier()
    store.forget(key)
    return client


class _Fetched:
    """A checkpoint engine of DeepSpeed's that brings each file to this node when it is loaded; for loading only."""

    def __init__(self, store: Store, key: str, files: Collection[str], own: Any) -> None:
        self._store, self._key, self._files, self._own = store, key, files, own
        self.root = store.outline(key)

    def load(self, path: str, map_location: Any = None) -> Any:
        name = str(Path(path).relative_to(self.root))
        if name not in self._files:
            raise IntegrityError(f"{path} is no file of the checkpoint {self._store.address(self._key)}")
        return self._own.load(str(self._store.fetch(self._key, name)), map_location)


def _newest_intact(store: Store, checkpoints: str, warn: Callable[[str], object]) -> CheckpointManifest | None:
    """The newest checkpoint of which all files are as they were written; every rank hashes its share of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in reversed(from_first_rank(lambda: _steps(store, checkpoints))):
        key = f"{checkpoints}/{name}"
        manifest = from_first_rank(partial(_manifest, store, key))
        if manifest is not None and everywhere(store.holds(key, manifest.share(rank, world))):
            return manifest
        if rank == 0:
            warn(f"checkpoint {store.address(key)} is damaged; trying the one before")
    return None


def _manifest(store: Store, key: str) -> CheckpointManifest | None:
    try:
        return CheckpointManifest.load(store, f"{key}/{MANIFEST}")
    except IntegrityError:
        return None


def _steps(store: Store, checkpoints: str) -> list[str]:
    return [_name(step) for step in checkpoint_steps(store, checkpoints)]


def _name(step: int) -> str:
    return f"{CHECKPOINT_PREFIX}{step:06d}"


@contextmanager
def _failed_writes(path: Path | str) -> Iterator[None]:
    """Turn a failed write into an `EnvironmentFault`; torch reports some as an error of its container."""
    try:
        with storage_faults(path):
            yield
    except RuntimeError as error:
        if "inline_container" in str(error):
            raise EnvironmentFault(f"disk full or failing at {path}: a checkpoint could not be written") from error
        raise


def _allow_deepspeed_types() -> None:
    """The types that a DeepSpeed checkpoint holds besides tensors; everything else in a pickle is refused."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum])
