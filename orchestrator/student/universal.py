"""Checkpoints that any number of ranks can load: DeepSpeed's universal format, in which every parameter is whole.

    <stage folder>/checkpoints/universal-step-000050/engine/...   made of step-000050 when another number of ranks goes on
                                                     manifest.json   hashes, and which checkpoint it was made of

It is a copy as large as its source, needed only until the next checkpoint is saved.
"""

from __future__ import annotations

import contextlib
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import IntegrityError, SpecError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.files import Store, storage_faults
from orchestrator.store.records import MANIFEST, FileRecord, Record, contents_beside_manifest, describe_folder

_PREFIX = "universal-"


class UniversalManifest(Record):
    source: str
    """Fingerprint of the files of the checkpoint that it was made of."""
    files: dict[str, FileRecord]


def check_elastic(engine: Any, world: int) -> None:
    """Raise `SpecError` if a checkpoint of `world` ranks cannot be loaded by another number of them."""
    from deepspeed.pipe import PipelineModule

    if isinstance(engine.module, PipelineModule) or engine.has_moe_layers:
        raise SpecError(
            f"train.workers: this training began on {world} workers, and only with train.parallel.kind zero can it go on "
            f"with another number; set it back to {world}"
        )


def make_universal(store: Store, checkpoints: str, name: str, files: dict[str, FileRecord], tag: str) -> None:
    """Convert checkpoint `name`, whose verified content is `files`, unless that is done; called on one rank.

    Needs memory for one rank's share of the source. Raises `EnvironmentFault`, and what torch raises for a failed write or
    a foreign pickle.
    """
    key, source = universal_key(checkpoints, name), fingerprint("checkpoint", files)
    if _intact(store, key, source):
        return
    origin = store.local(f"{checkpoints}/{name}")
    with store.folder_for(key) as built, storage_faults(built):
        _convert(origin / tag, built, tag)
        (built / MANIFEST).write_text(UniversalManifest(source=source, files=describe_folder(built)).model_dump_json())


def load_universal(engine: Any, path: Path, tag: str) -> dict[str, Any]:
    """Load the universal checkpoint in `path` on every rank; returns what the client has put into its source."""
    optimizer = engine.optimizer.optimizer
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True  # read by nothing but the loading of a checkpoint
    model_states, client = engine.load_checkpoint(str(path), tag=tag)
    engine._config.load_universal_checkpoint = False
    # Under ZeRO-3, DeepSpeed 0.19.8 gives all groups the settings of the first, and all states one tensor to count steps in.
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
    # It restores parameters only.
    saved = torch.load(model_states, map_location="cpu", mmap=True, weights_only=True)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
    return client


def universal_key(checkpoints: str, name: str) -> str:
    """Where the universal form of checkpoint `name` lies."""
    return f"{checkpoints}/{_PREFIX}{name}"


def drop_universal(store: Store, checkpoints: str) -> None:
    """Remove all universal checkpoints."""
    for name in store.keys(checkpoints):
        if name.startswith(_PREFIX):
            store.remove(f"{checkpoints}/{name}")


def _intact(store: Store, key: str, source: str) -> bool:
    try:
        manifest = UniversalManifest.load(store, f"{key}/{MANIFEST}")
    except IntegrityError:
        return False
    if manifest is None or manifest.source != source:
        return False
    return contents_beside_manifest(store, key) == manifest.files


def _convert(source: Path, folder: Path, tag: str) -> None:
    """Convert `source` to `tag` in `folder`."""
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=os.path.relpath(source, folder),
        output_folder=tag,
        num_extract_workers=1,  # more would be forks of this process
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # Its paths become regular expressions: with the whole path, a "+" in the storage's name would match no file.
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
