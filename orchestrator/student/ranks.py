"""What the ranks of a training agree on; every function is called on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, the only one that calls it."""
    made: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]


def everywhere(true: bool) -> bool:
    """Whether `true` holds on every rank."""
    return all(gathered(true))


def gathered(own: T) -> list[T]:
    """What each rank gave, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
