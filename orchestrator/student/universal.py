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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from orchestrator.errors import IntegrityError, SpecError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.files import Store, storage_faults
from orchestrator.store.records import MANIFEST, FileRecord, Record, describe_folder
from orchestrator.student.ranks import await_key, everywhere, from_first_rank, gathered

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
    """Convert checkpoint `name`, whose verified content is `files`, unless that is done; called on every rank.

    The ranks that see the folder of rank 0, all on a shared directory and those of its node on S3, share the work out: each
    needs memory for one rank's share of the source. The others wait for the result without a collective, which would time out.
    Raises `EnvironmentFault`, and what torch raises for a failed write or a foreign pickle.
    """
    key, source = universal_key(checkpoints, name), fingerprint("checkpoint", files)
    if _intact(store, key, source):
        return
    from_first_rank(lambda: store.remove(key))
    if dist.get_rank() == 0:
        with store.part_of(key) as part, storage_faults(part.folder):
            (part.folder / tag).mkdir()
            team = Team.of(part.folder / tag)
            _convert(store.local(f"{checkpoints}/{name}") / tag, part.folder, tag, team)
            part.files.update(team.described(part.folder))
            manifest = UniversalManifest(source=source, files=part.files)
            (part.folder / MANIFEST).write_text(manifest.model_dump_json())
        store.publish(key, [part])
        return
    team = Team.of(None)
    if team.member:
        team.help(team.folder.parent)
    await_key(store, key)


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
    """Return the key of the universal form of checkpoint `name`."""
    return f"{checkpoints}/{_PREFIX}{name}"


def drop_universal(store: Store, checkpoints: str) -> None:
    """Remove all universal checkpoints."""
    for name in store.keys(checkpoints):
        if name.startswith(_PREFIX):
            store.remove(f"{checkpoints}/{name}")


def _intact(store: Store, key: str, source: str) -> bool:
    """Return whether universal checkpoint `key` is made of `source` and undamaged; every rank hashes its share of it."""
    manifest = from_first_rank(partial(_manifest, store, key))
    if manifest is None or manifest.source != source:
        return False
    names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    return everywhere(store.holds(key, {name: manifest.files[name] for name in names}))


def _manifest(store: Store, key: str) -> UniversalManifest | None:
    try:
        return UniversalManifest.load(store, f"{key}/{MANIFEST}")
    except IntegrityError:
        return None


@dataclass(frozen=True)
class Team:
    """The ranks that convert a checkpoint together, because they see the same folder."""

    folder: Path
    """Folder in which the result is built."""
    group: Any
    place: int
    """Index of this rank in the team; -1 for a rank that is not in it."""
    size: int

    @classmethod
    def of(cls, folder: Path | None) -> Team:
        """The team that works in the `folder` of rank 0; called on every rank, on the others with None."""
        shared: Any = from_first_rank(lambda: folder)
        members = [rank for rank, sees in enumerate(gathered(shared.is_dir())) if sees]
        group = dist.new_group(members, backend="gloo")
        place = members.index(dist.get_rank()) if dist.get_rank() in members else -1
        return cls(shared, group, place, len(members))

    @property
    def member(self) -> bool:
        return self.place >= 0

    def share_out(self, work: Callable[[Any], Any] | None, chunks: Sequence[Any]) -> list[Any]:
        """Return the result of `work` for each of the `chunks`, in any order; called on the leader, while the others `help`."""
        dist.broadcast_object_list([work, chunks], src=0, group=self.group)
        return self._own_share(work, chunks) if work else []

    def help(self, folder: Path) -> None:
        """Work in `folder` on what the leader shares out until it has nothing more."""
        with contextlib.chdir(folder):
            while True:
                task: list[Any] = [None, None]
                dist.broadcast_object_list(task, src=0, group=self.group)
                if task[0] is None:
                    return
                self._own_share(*task)

    def described(self, folder: Path) -> dict[str, FileRecord]:
        """Size and hash of the files in `folder`, by relative name; ends the work of the others."""
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        parts = self.share_out(partial(_describe, folder), [names[start :: self.size] for start in range(self.size)])
        self.share_out(None, [])
        return {name: record for part in parts for name, record in part.items()}

    def _own_share(self, work: Callable[[Any], Any], chunks: Sequence[Any]) -> list[Any]:
        results: list[Any] = [None] * self.size
        dist.all_gather_object(results, [work(chunk) for chunk in chunks[self.place :: self.size]], group=self.group)
        return [made for part in results for made in part]


def _describe(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    return describe_folder(folder, names)


def _convert(source: Path, folder: Path, tag: str, team: Team) -> None:
    """Convert `source` to `tag` in `folder`; called on the leader of `team`."""
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

    def share_out(work: Callable[[Any], Any], chunks: Iterable[Any], _workers: int) -> list[Any]:
        return team.share_out(work, list(chunks))

    # Its paths become regular expressions: with the whole path, a "+" in the storage's name would match no file.
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        patch.object(ds_to_universal, "_do_parallel_work", share_out),
    ):
        ds_to_universal.main(options)
