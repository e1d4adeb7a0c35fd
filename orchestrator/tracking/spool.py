"""The durable side of tracking: a run's metric log, and the outbox of what MLflow has yet to be told.

The log is `metrics.jsonl`, one line per point, each step of a stage at most once. Lines survive a killed process, not a
power cut (nothing is synced: a training step must not wait for a disk). A line counts once its newline is written, so
a torn end is cut off by the next writer and skipped by every reader.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

_MAX_POINTS = 1000
_ROUND_S, _POLL_S, _FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 2.0, 0.5, 30.0


class Point(NamedTuple):
    """The measurements of one stage at one step; `time_s` is Unix time."""

    stage: str
    step: int
    time_s: float
    metrics: dict[str, float]


class Spool:
    """Appends to and reads the log at `path`; threads may share it, and processes may if each stage has one writer.

    Raises `OSError` if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened():
            pass
        self._high_water: dict[str, int] = {}
        for point in self.read():
            self._raise_high_water(point.stage, point.step)

    def append(self, stage: str, step: int, metrics: Mapping[str, float], time_s: float) -> bool:
        """Record the finite values of `metrics`; True if a line was written.

        A step at or below the highest one known of `stage` is dropped: after a restart steps repeat. Raises `OSError`
        if the disk does not take the whole line; the log stays readable and the step can be appended again.
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"stage": stage, "step": step, "time_s": time_s, "metrics": finite}).encode() + b"\n"
        with self._mutex:
            if not finite or step <= self._high_water.get(stage, -1):
                return False
            with self._opened() as descriptor:
                if os.write(descriptor, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._raise_high_water(stage, step)
            return True

    def read(self, stage: str | None = None) -> list[Point]:
        """All points, or those of one stage, in the order they were written."""
        return [point for point, _ in follow(self.path) if stage is None or point.stage == stage]

    def _raise_high_water(self, stage: str, step: int) -> None:
        self._high_water[stage] = max(step, self._high_water.get(stage, -1))

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file, open for appending, under a lock that other processes respect, without a torn last line."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.ftruncate(descriptor, self.path.read_bytes().rfind(b"\n") + 1)
            yield descriptor
        finally:
            os.close(descriptor)


def follow(path: Path, offset: int = 0) -> Iterator[tuple[Point, int]]:
    """The complete points from byte `offset` on, each with the offset behind it.

    Starts over if the file has become shorter than `offset`; a file that is not there has no points. A line that is
    no point (a damaged disk) is skipped.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        offset = offset if offset <= os.fstat(file.fileno()).st_size else 0
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield Point(**json.loads(line)), offset
            except (ValueError, TypeError):
                continue


@dataclass(frozen=True)
class Command:
    """Something other than points to tell MLflow, given at Unix time `time_ms` when the log was `log_bytes` long."""

    kind: str
    stage: str
    args: dict[str, Any]
    time_ms: int
    log_bytes: int


@dataclass
class _State:
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Marks everything that belongs to this run, in any process."""
    experiment_id: str | None = None
    runs: dict[str, str] = field(default_factory=dict)
    """MLflow run ids by stage."""
    cursor: int = 0
    """Bytes of the log that MLflow has."""
    pending: list[dict[str, Any]] = field(default_factory=list)


class Outbox:
    """Commands and points in the order in which they were given, until they are delivered; thread-safe.

    Kept in the JSON file `path`, which is replaced whole at every change. Raises `OSError` if it cannot be written; the
    change holds in memory all the same.
    """

    def __init__(self, path: Path, log: Path) -> None:
        self._path, self._log = path, log
        self._mutex = threading.Lock()
        self._closed = False
        try:
            self._state = _State(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):  # none yet, or damaged: begin anew
            self._state = _State()

    @property
    def key(self) -> str:
        return self._state.key

    @property
    def experiment_id(self) -> str | None:
        return self._state.experiment_id

    @property
    def runs(self) -> dict[str, str]:
        return self._state.runs

    def put(self, *commands: tuple[str, str, dict[str, Any]]) -> None:
        """Add commands, each (kind, stage, arguments)."""
        with self._mutex:
            now, size = int(time.time() * 1000), self._log_bytes()
            self._state.pending += [asdict(Command(*command, now, size)) for command in commands]
            self._save()

    def head(self) -> Command | list[tuple[Point, int]] | None:
        """Return what is to be delivered next: points (each with the offset behind it), a command, or None."""
        with self._mutex:
            command = Command(**self._state.pending[0]) if self._state.pending else None
            end = command.log_bytes if command else self._log_bytes()
            new = takewhile(lambda found: found[1] <= end, follow(self._log, self._state.cursor))
            return list(islice(new, _MAX_POINTS)) or command

    def delivered(self, item: Command | list[tuple[Point, int]]) -> None:
        """Take the `head` off."""
        with self._mutex:
            if isinstance(item, Command):
                del self._state.pending[0]
            else:
                self._state.cursor = item[-1][1]
            self._save()

    def set_run(self, stage: str, run_id: str, experiment_id: str) -> None:
        with self._mutex:
            self._state.runs = self._state.runs | {stage: run_id}
            self._state.experiment_id = experiment_id
            self._save()

    def forget_run(self, stage: str) -> None:
        """Drop a run that MLflow no longer has, and let the whole log be delivered again."""
        with self._mutex:
            self._state.runs = {k: v for k, v in self._state.runs.items() if k != stage}
            self._state.cursor = 0
            self._save()

    def close(self) -> None:
        """Leave the file alone from now on: it belongs to the next process."""
        with self._mutex:
            self._closed = True

    def _log_bytes(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    def _save(self) -> None:
        if self._closed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        temporary.write_text(json.dumps(asdict(self._state)))
        temporary.replace(self._path)


class Courier:
    """Delivers an outbox from one daemon thread, in order, trying again (at most 30 s apart) until it works.

    `send` delivers a command or some points and may raise anything; `on_error` hears of it. Both run in the thread.
    """

    def __init__(
        self, outbox: Outbox, send: Callable[[Command | list[Point]], None], on_error: Callable[[Exception], None]
    ) -> None:
        self._outbox, self._send, self._on_error = outbox, send, on_error
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="courier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Look into the outbox soon, not only at the next turn."""
        self._wake.set()

    def finish(self, timeout_s: float) -> bool:
        """Wait until the outbox is empty, at most `timeout_s`, then stop; False if the thread was still at work."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._abandoned.set()
        self._outbox.close()  # a thread that still hangs in a request must not write over the next run's state
        return not self._thread.is_alive()

    def _work(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._abandoned.is_set():
            closing = self._closing.is_set()
            if self._deliver():
                if closing:
                    return
                backoff_s = _FIRST_BACKOFF_S
                self._closing.wait(_ROUND_S)  # gathers points, so that a fast student is not a request per step
                self._wake.wait(_POLL_S)
                self._wake.clear()
            elif self._closing.wait(backoff_s):
                self._abandoned.wait(_FIRST_BACKOFF_S)
            else:
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _deliver(self) -> bool:
        """Send all there is; False at the first failure."""
        try:
            while not self._abandoned.is_set() and (item := self._outbox.head()):
                self._send(item if isinstance(item, Command) else [point for point, _ in item])
                self._outbox.delivered(item)
            return True
        except Exception as error:
            self._on_error(error)
            return False
