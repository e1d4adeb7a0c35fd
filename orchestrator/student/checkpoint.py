"""Training checkpoints: complete or invisible, checked before a byte of them is unpickled.

    <stage folder>/checkpoints/step-000050/engine/...   what DeepSpeed writes, every rank its part
                                           manifest.json   sizes and hashes, the last part before all is published

The newest one that is intact is the one to resume from; a damaged one is passed over with a warning. As many ranks as wrote
it load it as it is, bit for bit; for another number it is converted first (`student/universal.py`).
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import EnvironmentFault, IntegrityError
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.store.files import Store
from orchestrator.store.records import MANIFEST, FileRecord, Record, contents_beside_manifest
from orchestrator.student.best import Selection
from orchestrator.student.job import CHECKPOINT_PREFIX, checkpoint_steps
from orchestrator.student.universal import check_elastic, drop_universal, load_universal, make_universal, universal_key

KEPT = 2
_TAG = "engine"
log = logging.getLogger(__name__)


class CheckpointManifest(Record):
    step: int
    """Optimizer steps done."""
    world: int
    """Ranks that wrote it. The rest of the layout, `train.parallel`, is in the name of the stage folder."""
    files: dict[str, FileRecord]


def save_checkpoint(
    engine: Any, schedule: ObjectiveSchedule, store: Store, folder: str, step: int, selection: Selection | None = None
) -> None:
    """Save the state after `step` optimizer steps; called on every rank."""
    key, world = f"{folder}/checkpoints/{_name(step)}", dist.get_world_size()
    client = {"objective": schedule.state()} | ({"selection": selection.state()} if selection else {})
    with store.part_of(key) as own, _failed_writes(own.folder):
        engine.save_checkpoint(str(own.folder), tag=_TAG, save_latest=False, client_state=client)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, own)
    if dist.get_rank() == 0:
        files = {name: record for part in parts for name, record in part.files.items()}
        with store.part_of(key) as last:
            (last.folder / MANIFEST).write_text(CheckpointManifest(step=step, world=world, files=files).model_dump_json())
        store.publish(key, [*parts, last])
        for old in _steps(store, folder)[:-KEPT]:
            store.remove(f"{folder}/checkpoints/{old}")
        drop_universal(store, f"{folder}/checkpoints")
    if selection:
        selection.saved()
        if dist.get_rank() == 0:
            selection.prune()
    dist.barrier()


def restore_checkpoint(
    engine: Any,
    schedule: ObjectiveSchedule,
    store: Store,
    folder: str,
    warn: Callable[[str], object] = log.warning,
    selection: Selection | None = None,
) -> int:
    """Load the newest intact checkpoint; returns the optimizer steps done, 0 without one. `warn` is told of damaged ones.

    Raises `SpecError` if it is of another number of ranks and the parallel strategy does not allow for that.
    """
    found: list[CheckpointManifest | None] = [None]
    if dist.get_rank() == 0:
        store.sweep(f"{folder}/checkpoints")
        found = [_newest_intact(store, folder, warn)]
    dist.broadcast_object_list(found, src=0)
    manifest = found[0]
    if manifest is None:
        return 0
    _allow_deepspeed_types()
    try:
        client = _load(engine, store, f"{folder}/checkpoints", manifest)
    except pickle.UnpicklingError as error:
        where = store.address(f"{folder}/checkpoints/{_name(manifest.step)}")
        raise IntegrityError(f"checkpoint {where} holds what no checkpoint of ours holds: {error}") from error
    schedule.restore(client["objective"])
    if selection:
        selection.restore(client["selection"])
    return manifest.step


def _load(engine: Any, store: Store, checkpoints: str, manifest: CheckpointManifest) -> dict[str, Any]:
    name, world = _name(manifest.step), dist.get_world_size()
    key = f"{checkpoints}/{name}"
    if manifest.world != world:
        check_elastic(engine, manifest.world)
    # Without ZeRO every rank has the whole state, whatever their number.
    if manifest.world == world or engine.zero_optimization_stage() == 0:
        client = engine.load_checkpoint(str(store.local(key)), tag=_TAG)[1]
    else:
        whole = universal_key(checkpoints, name)
        if dist.get_rank() == 0:
            log.info("converting a checkpoint of %d ranks for %d: %s", manifest.world, world, store.address(whole))
            with _failed_writes(store.address(whole)):
                make_universal(store, checkpoints, name, manifest.files, _TAG)
        dist.barrier()
        client = load_universal(engine, store.local(whole), _TAG)
        dist.barrier()
        store.forget(whole)
    dist.barrier()
    store.forget(key)
    return client


def drop_checkpoints(store: Store, folder: str) -> None:
    """Remove all checkpoints of a finished training."""
    store.remove(f"{folder}/checkpoints")


def _steps(store: Store, folder: str) -> list[str]:
    return [_name(step) for step in checkpoint_steps(store, folder)]


def _name(step: int) -> str:
    return f"{CHECKPOINT_PREFIX}{step:06d}"


def _newest_intact(store: Store, folder: str, warn: Callable[[str], object]) -> CheckpointManifest | None:
    for name in reversed(_steps(store, folder)):
        key = f"{folder}/checkpoints/{name}"
        try:
            manifest = CheckpointManifest.load(store, f"{key}/{MANIFEST}")
        except IntegrityError:
            manifest = None
        if manifest is not None and contents_beside_manifest(store, key) == manifest.files:
            return manifest
        warn(f"checkpoint {store.address(key)} is damaged; trying the one before")
    return None


@contextmanager
def _failed_writes(path: Path | str) -> Iterator[None]:
    """Turn torch's report of a failed write, an error of its container, into an `EnvironmentFault`."""
    try:
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
