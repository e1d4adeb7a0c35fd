"""Computing resources of this machine, found without torch and without Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.runtime.environment import visible_gpus

AMD_DRIVER = Path("/dev/kfd")
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
ANSWER_S = 20.0


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int | None
    """Bytes; None if the driver does not say."""


@dataclass(frozen=True)
class Machine:
    cores: int
    """That this process may use."""
    memory: int
    """Bytes that it may use, swap included."""
    free_memory: int
    """Bytes of `memory` that are not in use now."""
    gpus: tuple[Gpu, ...] | None
    """None where it cannot be told without the libraries that use them."""


def this_machine() -> Machine:
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = _cgroup_limit()
    total = min(ram.total, limit or ram.total) + swap.total
    return Machine(len(os.sched_getaffinity(0)), total, min(total, ram.available + swap.free), _gpus())


def _cgroup_limit() -> int | None:
    """Bytes that a container may use."""
    try:
        text = CGROUP_MEMORY.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _gpus() -> tuple[Gpu, ...] | None:
    """NVIDIA's, as far as this process may see them; of others it can only be told that there are some."""
    wanted = visible_gpus()
    if wanted == 0:
        return ()
    found = None if AMD_DRIVER.exists() else _asked_driver()
    return found if wanted is None or found is None else found[:wanted]


def _asked_driver() -> tuple[Gpu, ...] | None:
    """Return the GPUs that nvidia-smi lists, or without it those that the driver shows. None if nvidia-smi does not answer."""
    if shutil.which("nvidia-smi") is None:
        return tuple(Gpu(device.name, None) for device in sorted(Path("/dev").glob("nvidia[0-9]*")))
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    rows = [line.rpartition(",") for line in listed.splitlines() if "," in line]
    return tuple(Gpu(name.strip(), int(size) << 20 if size.strip().isdigit() else None) for name, _, size in rows)
