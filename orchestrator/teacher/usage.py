"""What became of the teacher replicas' time, from the receipts of their shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Seconds:
    """Of one replica, so far."""

    busy: float = 0.0
    """Labelling."""
    idle: float = 0.0
    """Waiting for the next shard."""
    blocked: float = 0.0
    """Waiting for the student, which labels may not run ahead of too far."""


class Usage:
    def __init__(self) -> None:
        self.replicas: dict[str, Seconds] = {}
        """By the replica's id, in the order in which they showed up."""
        self._processes: dict[str, int] = {}

    def add(self, receipt: Mapping[str, Any]) -> bool:
        """Take in `receipt`; whether it is of a replica that was lost and replaced since its last one."""
        replica, process = str(receipt["replica"]), int(receipt["process"])
        seconds = self.replicas.setdefault(replica, Seconds())
        seconds.busy += receipt["seconds"]
        seconds.idle += receipt["idle_s"]
        seconds.blocked += receipt["blocked_s"]
        before, self._processes[replica] = self._processes.get(replica, process), process
        return process != before

    @property
    def total(self) -> Seconds:
        """Of all replicas together."""
        every = self.replicas.values()
        return Seconds(sum(s.busy for s in every), sum(s.idle for s in every), sum(s.blocked for s in every))

    @property
    def blocked_fraction(self) -> float:
        """Share of the time in which replicas could have labelled that they waited for the student."""
        total = self.total
        return total.blocked / (total.busy + total.blocked)
