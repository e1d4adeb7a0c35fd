"""Training checkpoints: complete or invisible, checked before a byte of them is unpickled.

    <stage folder>/checkpoints/step-000050/engine/...   what DeepSpeed writes, every rank its part
                                           manifest.json   sizes and hashes, written before the folder gets its name

The newest one that is intact is the one to resume from; a damaged one is passed over with a warning.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.errors import EnvironmentFault, IntegrityError
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.store.files import Store
from orchestrator.store.records import MANIFEST, FileRecord, Record, describe_folder

KEPT = 2
_TAG = "engine"
log = logging.getLogger(__name__)


class CheckpointManifest(Record):
    step: int
    """Optimizer steps done."""
    files: dict[str, FileRecord]


def save_checkpoint(engine: Any, schedule: ObjectiveSchedule, store: Store, folder: str, step: int) -> None:
    """Save the state after `step` optimizer steps; called on every rank."""
    key = f"{folder}/checkpoints/step-{step:06d}"
    partial = store.path(f"{folder}/checkpoints/.tmp-step-{step:06d}")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False, client_state={"objective": schedule.state()})
    except RuntimeError as error:  # torch reports a failed write as an error of its container
        if "inline_container" in str(error):
            raise EnvironmentFault(f"disk full or failing at {partial}: a checkpoint could not be written") from error
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        manifest = CheckpointManifest(step=step, files=describe_folder(partial))
        (partial / MANIFEST).write_text(manifest.model_dump_json())
        store.publish(partial, key)
        for old in _steps(store, folder)[:-KEPT]:
            shutil.rmtree(store.path(f"{folder}/checkpoints/{old}"))
    dist.barrier()


def restore_checkpoint(engine: Any, schedule: ObjectiveSchedule, store: Store, folder: str) -> int:
    """Load the newest intact checkpoint; returns the optimizer steps done, 0 without one."""
    found: list[str | None] = [_newest_intact(store, folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return 0
    _allow_deepspeed_types()
    path = store.path(f"{folder}/checkpoints/{found[0]}")
    try:
        _, client = engine.load_checkpoint(str(path), tag=_TAG)
    except pickle.UnpicklingError as error:
        raise IntegrityError(f"checkpoint {path} holds what no checkpoint of ours holds: {error}") from error
    schedule.restore(client["objective"])
    return int(found[0].removeprefix("step-"))


def drop_checkpoints(store: Store, folder: str) -> None:
    """Remove all checkpoints of a finished training."""
    shutil.rmtree(store.path(f"{folder}/checkpoints"), ignore_errors=True)


def _steps(store: Store, folder: str) -> list[str]:
    names = [name for name in store.keys(f"{folder}/checkpoints") if name.startswith("step-")]
    return sorted(names, key=lambda name: int(name.removeprefix("step-")))


def _newest_intact(store: Store, folder: str) -> str | None:
    for name in reversed(_steps(store, folder)):
        key = f"{folder}/checkpoints/{name}"
        try:
            manifest = CheckpointManifest.load(store, f"{key}/{MANIFEST}")
        except IntegrityError:
            manifest = None
        files = {n: r for n, r in describe_folder(store.path(key)).items() if n != MANIFEST}
        if manifest is not None and files == manifest.files:
            return name
        log.warning("checkpoint %s is damaged; trying the one before", store.path(key))
    return None


def _allow_deepspeed_types() -> None:
    """The types that a DeepSpeed checkpoint holds besides tensors; everything else in a pickle is refused."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum])
