"""Work that several runs may want at once is done by one of them; the others wait and take its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from orchestrator.errors import LockedError, ResumableError
from orchestrator.store.files import Lock, Store

T = TypeVar("T")
LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Made(Generic[T]):
    """A result, and whether this process made it."""

    result: T
    here: bool


@dataclass(frozen=True)
class Waiting:
    """The other side of a wait for another run."""

    say: Callable[[str], None]
    """Tells the user, once, that and for whom this run waits."""
    aborted: Callable[[], str | None] = lambda: None
    """The reason for which this run is ending, if it is."""


def make_once(
    store: Store, lock: str, finished: Callable[[], T | None], make: Callable[[Lock], T], waiting: Waiting
) -> Made[T]:
    """The result that `finished` finds, or that `make` makes while this process holds `lock`.

    While another process holds the lock, this one waits: for its result, or for the lock of one that died or gave up. Raises
    `ResumableError` if this run ends meanwhile, and whatever `make` raises.
    """
    told = False
    while True:
        result = finished()
        if result is not None:
            return Made(result, here=False)
        with ExitStack() as stack:
            try:
                held = stack.enter_context(store.exclusive(lock))
            except LockedError as error:
                if not told:
                    waiting.say(f"{error}; waiting for its result")
                told = True
            else:
                result = finished()  # the process that held the lock until now may have finished
                return Made(make(held), here=True) if result is None else Made(result, here=False)
        reason = waiting.aborted()
        if reason:
            raise ResumableError(f"stopped waiting for another run: {reason}")
        time.sleep(LOOK_EVERY_S)
