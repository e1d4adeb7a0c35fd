"""The student's pace, as a backpressure policy of Ray Data: no shard is handed out that lies too far ahead of the student.

So a pool that is ahead has nothing to do, and shrinks; it grows again when the student has caught up. Where nothing else runs,
Ray Data hands out one shard whatever its policies say; that one waits in the labeller.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import ray
from ray.data import Dataset
from ray.data._internal.execution.backpressure_policy import BackpressurePolicy

from orchestrator.runtime.board import STUDENT_SHARDS
from orchestrator.teacher.hand_out import add_policy

ASK_EVERY_S = 0.2


class Pace:
    """Decides when shards may be handed out, and remembers when they were held back."""

    def __init__(self, positions: Sequence[int], ahead: int | None, board: Any) -> None:
        """Take the `positions` of the shards in the demand, in the order of handing out; `ahead` None holds nothing back."""
        self._positions, self._ahead, self._board = positions, ahead, board
        self._started, self._asked = 0.0, 0.0
        self._held: list[list[float]] = []
        """The periods in which shards were held back: beginning and end, as of time.time()."""
        self._holding = False

    def govern(self, pool: Dataset) -> None:
        """Have Ray Data keep to this pace when it runs `pool`, whose last operation labels."""
        if self._ahead is not None:
            add_policy(pool, lambda *args: _Policy(self, *args))

    def allows(self, handed_out: int) -> bool:
        """Return whether one more shard may follow those that were handed out."""
        if self._ahead is None or handed_out >= len(self._positions):
            return True
        now = time.time()
        if now - self._asked > ASK_EVERY_S:
            progress: dict[str, float] = ray.get(self._board.progress.remote())
            self._started, self._asked = progress.get(f"student.{STUDENT_SHARDS}", 0), now
        hold = self._positions[handed_out] >= self._started + self._ahead
        if hold and not self._holding:
            self._held.append([now, now])
        elif hold or self._holding:
            self._held[-1][1] = now
        self._holding = hold
        return not hold

    def held_s(self, since: float, until: float) -> float:
        """Return for how many seconds between two times shards were held back."""
        recent = takewhile(lambda held: held[1] > since, reversed(self._held))
        return sum(max(0.0, min(until, end) - max(since, begin)) for begin, end in recent)


class _Policy(BackpressurePolicy):
    def __init__(self, pace: Pace, *args: Any) -> None:
        super().__init__(*args)
        self._pace = pace

    def can_add_input(self, op: Any) -> bool:
        return not op.get_autoscaling_actor_pools() or self._pace.allows(op.metrics.num_tasks_submitted)
