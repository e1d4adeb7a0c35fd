"""Resident memory of this process, as the kernel counts it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def reset_peak() -> int:
    """Forget the peak; the bytes that are resident."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that were resident since the start or `reset_peak`."""
    return _status("VmHWM")


def anonymous() -> int:
    """Bytes that are resident and of no file: without pages of weights that are mapped and only pass through."""
    return _status("RssAnon")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class HighWater:
    """The most that a measure was within a block, looked at every millisecond."""

    def __init__(self, measure: Callable[[], int]) -> None:
        self._measure, self._done, self.value = measure, threading.Event(), 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> HighWater:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.value = max(self.value, self._measure())
