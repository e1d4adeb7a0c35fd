"""The board: where the processes of a run tell each other how far they are.

One small actor beside the driver. Workers put up points (metrics by step) and progress; the driver takes them down for
display and tracking. Nothing durable lives here: what must survive is in the storage.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Point = dict[str, Any]
"""{"stage", "step", "time_s", "metrics"}"""

STUDENT_SHARDS = "shards_started"
"""Progress `<stage>.shards_started`: token shards that training has begun to read, in its order."""
FIRST_STEP = "first_step_time_s"
"""Progress `<stage>.first_step_time_s`: wall-clock time at which training had made its first optimizer step."""


class Board:
    def __init__(self) -> None:
        self._points: list[Point] = []
        self._warnings: list[str] = []
        self._lines: list[str] = []
        self._progress: dict[str, float] = {}
        self._aborted: str | None = None
        self._saves = 0
        self._deferred: dict[tuple[Any, ...], None] = {}
        self._setbacks: dict[str, tuple[int, str]] = {}
        """By teacher replica: how often a process of it has ended since it last labelled a shard, and the last cause told."""

    def post(self, stage: str, points: list[tuple[int, dict[str, float]]]) -> None:
        """Put up metrics of `stage`: (step, value by name), oldest first."""
        now = time.time()
        self._points += [{"stage": stage, "step": step, "time_s": now, "metrics": metrics} for step, metrics in points]

    def take(self) -> list[Point]:
        """Remove and return all points, oldest first."""
        points, self._points = self._points, []
        return points

    def warn(self, text: str) -> None:
        """Put up something that went wrong and was got over."""
        self._warnings.append(text)

    def say(self, text: str) -> None:
        """Put up a line for the user."""
        self._lines.append(text)

    def take_lines(self) -> list[str]:
        """Remove and return all lines for the user, oldest first."""
        lines, self._lines = self._lines, []
        return lines

    def take_warnings(self) -> list[str]:
        """Remove and return all warnings, oldest first."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def set_progress(self, name: str, value: float) -> None:
        self._progress[name] = value

    def progress(self) -> dict[str, float]:
        return self._progress

    def abort(self, reason: str) -> None:
        """Abort the run: waiting workers stop, and training workers save a checkpoint and stop."""
        self._aborted = self._aborted or reason

    def aborted(self) -> str | None:
        """Return the reason for which the run was aborted, None while it goes on."""
        return self._aborted

    def ask_for_checkpoint(self) -> None:
        """Have training workers save a checkpoint at their next step, and go on."""
        self._saves += 1

    def wanted(self) -> tuple[str | None, int]:
        """Return the reason of an abort, and how many checkpoints have been asked for."""
        return self._aborted, self._saves

    # Labelling.

    def defer(self, item: tuple[Any, ...]) -> None:
        """Put up a shard that another run has claimed, for any replica of this run to look after."""
        self._deferred[item] = None

    def deferred(self) -> list[tuple[Any, ...]]:
        """The shards that were put up and are not settled, oldest first."""
        return list(self._deferred)

    def settle(self, item: tuple[Any, ...]) -> bool:
        """Take down a shard that is committed by now; False if somebody else has."""
        there = item in self._deferred
        self._deferred.pop(item, None)
        return there

    def replica_starts(self, replica: str) -> tuple[int, str]:
        """Note that a process of a teacher replica starts.

        Returns how many of its processes have ended since the replica last labelled a shard, and the last cause told.
        """
        ended, cause = self._setbacks.get(replica, (-1, ""))
        self._setbacks[replica] = (ended + 1, cause)
        return self._setbacks[replica]

    def replica_failed(self, replica: str, cause: str) -> None:
        """Note why a process of a teacher replica is about to end."""
        self._setbacks[replica] = (self._setbacks[replica][0], cause)

    def replica_labelled(self, replica: str) -> None:
        """Note that a teacher replica has labelled a shard, so that earlier setbacks count no longer."""
        self._setbacks[replica] = (0, "")


def start_board() -> Any:
    """A handle to a new board on the driver's own node, whose loss ends the run anyway; costs no resources."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Board)
    return actor.options(scheduling_strategy=here).remote()
