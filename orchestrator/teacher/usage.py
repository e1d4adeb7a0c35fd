"""Time use of the teacher replicas, added up from the receipts of their shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Seconds:
    """The seconds of one replica so far."""

    busy: float = 0.0
    """Seconds in which the teacher answered."""
    idle: float = 0.0
    """Seconds of waiting for the next shard."""
    blocked: float = 0.0
    """Seconds of waiting for the student, which labels may not run ahead of too far."""


class Usage:
    """The seconds of all replicas."""

    def __init__(self) -> None:
        self.replicas: dict[str, Seconds] = {}
        """The seconds by replica id, in the order in which the replicas showed up."""
        self._processes: dict[str, int] = {}

    def add(self, receipt: Mapping[str, Any]) -> bool:
        """Add `receipt`; returns whether its replica was lost and replaced since its last one."""
        replica, process = str(receipt["replica"]), int(receipt["process"])
        seconds = self.replicas.setdefault(replica, Seconds())
        seconds.busy += receipt["seconds"]
        seconds.idle += receipt["idle_s"]
        seconds.blocked += receipt["blocked_s"]
        before, self._processes[replica] = self._processes.get(replica, process), process
        return process != before

    @property
    def total(self) -> Seconds:
        """The seconds of all replicas together."""
        every = self.replicas.values()
        return Seconds(sum(s.busy for s in every), sum(s.idle for s in every), sum(s.blocked for s in every))

    @property
    def blocked_fraction(self) -> float:
        """The share of the time in which replicas could have labelled that they waited for the student."""
        total = self.total
        return total.blocked / (total.busy + total.blocked)
