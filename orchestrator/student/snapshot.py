"""The state of a training as it is now, copied into this process's own memory, so that training can go on while it is written.

DeepSpeed decides which objects a rank saves and under which file names. It hands them to a checkpoint engine; `HostCopy` is one
that copies them instead of writing them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = "."
"""The folder that DeepSpeed is told to save in; nothing is written there."""


class HostMemory:
    """Copies of tensors in host memory, used again for the next copy of the same structure.

    Fresh memory costs more than the copy itself, since the kernel clears every page of it at first use. What has been
    copied stays valid until the next `copy`.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._next, self._from_gpu = 0, False
        self._copied: dict[tuple[Any, ...], torch.Tensor] = {}

    def begin(self) -> None:
        """Start a copy in place of the one before."""
        self._next, self._copied = 0, {}

    def copy(self, value: Any) -> Any:
        """`value` with every tensor in it copied; tensors that are the same memory share one copy.

        Copies from a GPU are complete after `finish`.
        """
        if isinstance(value, torch.Tensor):
            return self._copy_of(value.detach())
        if isinstance(value, dict):
            copied: Any = copy.copy(value)  # keeps the attributes that torch puts on the dictionaries of modules
            for key, inner in value.items():
                copied[key] = self.copy(inner)
            return copied
        if type(value) in (list, tuple):
            return type(value)(self.copy(inner) for inner in value)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Wait for the copies that are under way, and free what was not used again."""
        if self._from_gpu:
            torch.cuda.synchronize()
        del self._kept[self._next :]

    def _copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in self._copied:
            return self._copied[same]
        copied, self._from_gpu = self._room_for(tensor), self._from_gpu or tensor.is_cuda
        copied.copy_(tensor, non_blocking=True)
        self._copied[same] = copied
        return copied

    def _room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        place, self._next = self._next, self._next + 1
        if place < len(self._kept) and self._kept[place].shape == tensor.shape and self._kept[place].dtype == tensor.dtype:
            return self._kept[place]
        room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._kept[place : place + 1] = [room]
        return room


class HostCopy:
    """A checkpoint engine of DeepSpeed's that copies what it is told to save."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self.files: dict[str, Any] = {}
        """What was to be saved, by file name relative to `ROOT`."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files[os.path.relpath(path, ROOT)] = self._memory.copy(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False  # or DeepSpeed would copy what it hands over, too


def snapshot(engine: Any, memory: HostMemory, tag: str, client: dict[str, Any]) -> dict[str, Any]:
    """What this rank has to save of `engine` and `client`, by relative file name, in host memory; called on every rank."""
    memory.begin()
    copies = HostCopy(memory)
    with checkpoint_engine(engine, copies):
        engine.save_checkpoint(ROOT, tag=tag, save_latest=False, client_state=client)
    memory.finish()
    return copies.files


def write_snapshot(files: dict[str, Any], folder: Path) -> None:
    """Write what `snapshot` returned into `folder`, as DeepSpeed would have."""
    for name, state in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / name)


@contextmanager
def checkpoint_engine(engine: Any, other: Any) -> Generator[None]:
    """While it lasts, the DeepSpeed `engine` saves and loads through `other`."""
    own, scripts = engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine = other
    engine._copy_recovery_script = lambda _folder: None  # a program among the data, which nobody here may run
    try:
        yield
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = own, scripts
