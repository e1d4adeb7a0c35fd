"""Display of a run's progress: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.plan.make import Plan
from orchestrator.tracking import names

PLAIN_EVERY_S = 10.0
log = logging.getLogger("orchestrator")
"""Its level is how much is said: only warnings from WARNING on, details at DEBUG."""


@dataclass
class _Pace:
    """Speed and waiting of a training so far, as the report defines them: from its first step on, waiting included."""

    tokens: float = 0.0
    waited_s: float = 0.0
    took_s: float = 0.0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take a point that has rates."""
        took_s = metrics[names.INTERVAL_S]
        self.took_s += took_s
        self.tokens += metrics[names.TRAIN_TOKENS_PER_S] * took_s
        self.waited_s += metrics[names.LABEL_WAIT_FRACTION] * took_s

    def figures(self) -> dict[str, float]:
        """Under the names that a finished training has them by."""
        if not self.took_s:
            return {}
        return {"tokens_per_s": self.tokens / self.took_s, "label_wait_fraction": self.waited_s / self.took_s}


_SHOWN = (
    ("final_loss_nats", "loss {:.4f}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("label_wait_fraction", "waits {:.0%}"),
    (names.BYTES_PER_TOKEN, "{:.1f} B/token"),
)
_LIVE = {
    names.LOSS: "final_loss_nats",
    names.LABEL_TOKENS_PER_S: "tokens_per_s",
    names.BLOCKED_FRACTION: "label_wait_fraction",
    names.BYTES_PER_TOKEN: names.BYTES_PER_TOKEN,
}
"""Metrics that say how things are so far, and the figures of a finished stage that they become."""


@dataclass
class _Row:
    status: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    done: int = 0
    last: int = 0
    """`done` as the last point had it: less than `done` while steps are repeated after a worker's death."""
    total: int = 0
    first: int = 0
    """`done` when the stage was first heard of: what a resumed run had already."""
    first_at: float = 0.0
    """When that was; starting up says nothing about the pace."""
    pace: _Pace | None = None
    """None before the first rates, which are about starting up."""
    figures: dict[str, float] = field(default_factory=dict)

    def take(self, done: int, metrics: Mapping[str, float]) -> None:
        """Take a metric point, after which `done` steps or shards are done."""
        if not self.first_at:
            self.first, self.first_at = done, time.time()
        if names.TRAIN_TOKENS_PER_S in metrics:
            if self.pace is None or done <= self.last:  # a worker died, and its successor has started up
                self.pace = _Pace()
            else:
                self.pace.add(metrics)
            self.figures |= self.pace.figures()
        self.last, self.done = done, max(self.done, done)
        self.figures |= {_LIVE[name]: value for name, value in metrics.items() if name in _LIVE}

    def detail(self) -> str:
        parts = [f"{self.done}/{self.total}"] if self.total and self.done else []
        if self.status in ("ran", "reused") and "steps" in self.figures:
            parts = [f"{self.figures['steps']:.0f} steps"]
        parts += [text.format(self.figures[name]) for name, text in _SHOWN if name in self.figures]
        if self.status == "running" and self.done > self.first:
            left = (self.total - self.done) * (time.time() - self.first_at) / (self.done - self.first)
            parts.append(f"{left:,.0f} s left")
        return "  ".join(parts)


class Display:
    """Collects the state of the stages and shows it; everything goes to stderr, which leaves stdout to data."""

    def __init__(self, live: bool | None = None) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._quiet = log.level > logging.INFO
        self._live_wanted = self._console.is_terminal and not self._quiet if live is None else live
        self._live: Live | None = None
        self._rows: dict[str, _Row] = {}
        self._said = 0.0
        self._mutex = threading.Lock()

    @contextmanager
    def open(self, where: str, plan: Plan) -> Iterator[None]:
        """Show the run of `plan`; `where` is its first and its last line."""
        self._rows = {stage.name: _Row() for stage in plan.stages}
        self.say(where)
        try:
            if self._live_wanted:
                with Live(get_renderable=self._render, console=self._console, refresh_per_second=2) as self._live:
                    yield
            else:
                yield
        finally:
            self._live = None
            self.say(where)

    def say(self, line: str) -> None:
        """Print one line, above the live view where there is one; nothing where only warnings are wanted."""
        if not self._quiet:
            self.warn(line)

    def warn(self, line: str) -> None:
        """Print one line that is always shown."""
        if self._live is not None:
            self._console.print(Text(line))
        else:
            print(line, file=sys.stderr, flush=True)

    def expect(self, stage: str, total: int) -> None:
        """Tell how many steps or shards `stage` has."""
        self._rows[stage].total = total

    def stage_started(self, stage: str) -> None:
        with self._mutex:
            row = self._rows.setdefault(stage, _Row())
            row.status, row.started = "running", time.time()

    def stage_finished(self, stage: str, status: str, seconds: float, figures: Mapping[str, float]) -> None:
        """Show how `stage` ended; `figures` are those of the whole stage, some of which the points may not have told yet."""
        with self._mutex:
            row = self._rows[stage]
            row.status, row.seconds = status, seconds
            row.figures |= figures
        if self._live is None:
            self.say(f"{stage:<9} {status:<7} {seconds:6.1f} s  {row.detail()}".rstrip())

    def point(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Take a metric point; plain output shows one line every ten seconds."""
        with self._mutex:
            row = self._rows.setdefault(stage, _Row())
            row.take(step if stage == "labels" else step + 1, metrics)
        if self._live is None and time.time() - self._said > PLAIN_EVERY_S:
            self._said = time.time()
            going = {name: row.detail() for name, row in self._rows.items() if row.status == "running"}
            self.say(" | ".join(f"{name} {detail}" for name, detail in going.items() if detail))

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        marks = {"running": "●", "ran": "✓", "reused": "↺", "failed": "✗", "stopped": "■", "waiting": "·"}
        with self._mutex:
            for name, row in self._rows.items():
                seconds = time.time() - row.started if row.status == "running" else row.seconds
                timing = f"{seconds:,.0f} s" if row.status != "waiting" else ""
                table.add_row(marks[row.status], name, row.status, timing, row.detail())
        return Group(table)
