"""The gate before each optimizer step: all ranks go through it together, or none does.

No rank enters a step before every rank has its rows and labels. Whoever waits for another rank therefore waits here, on
the host and without a limit, and never inside a collective of the step, which has one. All ranks have done the same number
of steps here, so it is also where they save a checkpoint together when the run is aborted or a node is about to be taken away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist

from orchestrator.errors import ResumableError

ASK_EVERY_S = 0.5
LONGEST_WAIT = timedelta(days=7)
"""The longest wait for labels. A rank that dies ends the wait at once."""

T = TypeVar("T")


class Gate:
    """Made and used on every rank. The first rank asks the board, the others hear it from there."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._group: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self._reason: str | None = None
        self._saves_asked = self._saves_done = 0
        self._closed = threading.Event()
        if dist.get_rank() == 0:
            threading.Thread(target=self._ask, name="gate", daemon=True).start()

    def through(self, steps: Iterator[tuple[int, T]], save: Callable[[], int]) -> Generator[tuple[int, T]]:
        """Yield what `steps` gives, each once all ranks have theirs. `save` saves a checkpoint and returns its step.

        Raises `ResumableError`, after a checkpoint has been saved, if the run is ending.
        """
        try:
            while True:
                item, reason = None, None
                try:
                    item = next(steps, None)
                except ResumableError as error:  # of a wait for labels that will not come
                    reason = str(error)
                if item is None and reason is None:
                    return
                stop, saves = self._agree(reason or self._reason)
                if stop or saves > self._saves_done:
                    self._saves_done = saves
                    at = save()
                    if stop:
                        raise ResumableError(
                            f"stopped at step {at}, where it goes on: {reason or self._reason or 'the run is ending'}"
                        )
                assert item is not None
                yield item
        finally:
            self._closed.set()

    def _agree(self, reason: str | None) -> tuple[bool, int]:
        """Return whether any rank is to stop, and how many checkpoints have been asked for."""
        wanted = torch.tensor([int(reason is not None), self._saves_asked])
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        return bool(wanted[0]), int(wanted[1])

    def _ask(self) -> None:
        while not self._closed.wait(ASK_EVERY_S):
            try:
                self._reason, self._saves_asked = ray.get(self._board.wanted.remote())
            except Exception as error:  # the driver's node is gone, and with it the run
                self._reason = f"the driver does not answer: {error}"
                return
