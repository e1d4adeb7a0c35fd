"""Agreement between the ranks of a training, and waiting for work of rank 0 that may take long."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from orchestrator.store.files import Store

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
T = TypeVar("T")


def from_first_rank(make: Callable[[], T]) -> T:
    """Return the result of `make` on rank 0, the only rank that calls it; called on every rank."""
    made: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]


def everywhere(true: bool) -> bool:
    """Return whether `true` holds on every rank; called on every rank."""
    return all(gathered(true))


def gathered(own: T) -> list[T]:
    """Return the values that the ranks gave, by rank; called on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def await_key(store: Store, key: str) -> None:
    """Wait until the file or folder `key` is there. Unlike a collective, this may take as long as it takes."""
    pause = FIRST_PAUSE_S
    while not store.exists(key):
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
