"""What a person sees while a run goes on: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
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
class _Row:
    status: str = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    done: int = 0
    total: int = 0
    first: int = 0
    """`done` when the stage was first heard of: what a resumed run had already."""
    first_at: float = 0.0
    """When that was; starting up says nothing about the pace."""
    metrics: dict[str, float] = field(default_factory=dict)

    def detail(self) -> str:
        parts = [f"{self.done}/{self.total}"] if self.total and self.done else []
        shown = (
            (names.LOSS, "loss {:.4f}"),
            (names.TRAIN_TOKENS_PER_S, "{:,.0f} tokens/s"),
            (names.LABEL_TOKENS_PER_S, "{:,.0f} tokens/s"),
            (names.LABEL_WAIT_FRACTION, "waits {:.0%}"),
            (names.BYTES_PER_TOKEN, "{:.1f} B/token"),
        )
        parts += [text.format(self.metrics[name]) for name, text in shown if name in self.metrics]
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

    def stage_finished(self, stage: str, status: str, seconds: float) -> None:
        with self._mutex:
            row = self._rows[stage]
            row.status, row.seconds = status, seconds
        if self._live is None:
            self.say(f"{stage:<9} {status:<7} {seconds:6.1f} s  {row.detail()}".rstrip())

    def point(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Take a metric point; plain output shows one line every ten seconds."""
        with self._mutex:
            row = self._rows.setdefault(stage, _Row())
            done = step if stage == "labels" else step + 1
            if not row.first_at:
                row.first, row.first_at = done, time.time()
            row.done = max(row.done, done)
            row.metrics.update(metrics)
        if self._live is None and time.time() - self._said > PLAIN_EVERY_S:
            self._said = time.time()
            self.say(" | ".join(f"{name} {row.detail()}" for name, row in self._rows.items() if row.status == "running"))

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        marks = {"running": "●", "ran": "✓", "reused": "↺", "failed": "✗", "stopped": "■", "waiting": "·"}
        with self._mutex:
            for name, row in self._rows.items():
                seconds = time.time() - row.started if row.status == "running" else row.seconds
                timing = f"{seconds:,.0f} s" if row.status != "waiting" else ""
                table.add_row(marks[row.status], name, row.status, timing, row.detail())
        return Group(table)
