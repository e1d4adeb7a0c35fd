"""The state of a training as it is now, copied into this process's own memory, so that training can go on while it is written.

DeepSpeed decides which objects a rank saves and under which file names. It hands them to a checkpoint engine; `HostCopy` is one
that plans their copies instead of writing them. The copies themselves are made while the next step is under way, which changes
nothing of all this before the optimizer updates its weights.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

ROOT = "."
"""The folder that DeepSpeed is told to save in; nothing is written there."""


class HostMemory:
    """Copies of tensors in host memory, used again for the next copy of the same structure.

    Fresh memory costs more than the copy itself, since the kernel clears every page of it at first use. What has been
    copied stays valid until the next `begin`.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self.begin()

    def begin(self) -> None:
        """Start a copy in place of the one before."""
        self._next = 0
        self._planned: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rooms: dict[tuple[Any, ...], torch.Tensor] = {}

    def plan(self, value: Any) -> Any:
        """`value` with room for every tensor in it, to be filled by `fill`; what is no tensor is copied now.

        Tensors that are the same memory share their room.
        """
        if isinstance(value, torch.Tensor):
            return self._room_of(value.detach())
        if isinstance(value, dict):
            planned = copy.copy(cast(dict[Any, Any], value))  # keeps what torch puts on the dictionaries of modules beside
            for key, inner in planned.items():
                planned[key] = self.plan(inner)
            return planned
        if type(value) in (list, tuple):
            return type(value)(self.plan(inner) for inner in value)
        return copy.deepcopy(value)

    def fill(self) -> None:
        """Copy what was planned, from a GPU beside what it computes, and free what was not used again; in any thread."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for room, tensor in self._planned:
                room.copy_(tensor, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
        self._planned = []
        del self._kept[self._next :]

    def _room_of(self, tensor: torch.Tensor) -> torch.Tensor:
        same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in self._rooms:
            return self._rooms[same]
        if tensor.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(tensor.device)
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))  # what the step before asked for
        room = self._rooms[same] = self._next_room(tensor)
        self._planned.append((room, tensor))
        return room

    def _next_room(self, tensor: torch.Tensor) -> torch.Tensor:
        place, self._next = self._next, self._next + 1
        if place < len(self._kept) and self._kept[place].shape == tensor.shape and self._kept[place].dtype == tensor.dtype:
            return self._kept[place]
        room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._kept[place : place + 1] = [room]
        return room


class HostCopy:
    """A checkpoint engine of DeepSpeed's that plans to copy what it is told to save."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self.files: dict[str, Any] = {}
        """Values that were to be saved, by file name relative to `ROOT`."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files[os.path.relpath(path, ROOT)] = self._memory.plan(state_dict)

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
    """Return what this rank has to save of `engine` and `client`, by relative file name; called on every rank.

    It lies in `memory`, which must be filled before the optimizer's next step.
    """
    memory.begin()
    copies = HostCopy(memory)
    with checkpoint_engine(engine, copies):
        engine.save_checkpoint(ROOT, tag=tag, save_latest=False, client_state=client)
    return copies.files


def before_update(engine: Any, wait: Callable[[], None]) -> RemovableHandle:
    """Have the optimizer of `engine` call `wait` before it changes weights or states, until the handle is removed."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):  # DeepSpeed wraps the one of torch
        optimizer = optimizer.optimizer
    return optimizer.register_step_pre_hook(lambda *_: wait())


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
