"""The figures that runs are compared by: where report.json has them, which way is better, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from orchestrator.report import words


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    """In the data for machines."""
    title: str
    path: tuple[str, ...]
    """In report.json."""
    better: Literal["lower", "higher"] | None
    """None for a figure by which no run is better than another."""
    shown: Callable[[float | None], str]
    on: Literal["heldout", "teacher", "machine"]
    """Common property that the figure requires of compared runs: the held-out rows, the teacher as well, or the machine."""


def _decimals(digits: int) -> Callable[[float | None], str]:
    return lambda value: words.number(value, digits)


def _percent(value: float | None) -> str:
    """One decimal, because what is compared may lie close together."""
    return words.NOTHING if value is None else f"{100 * value:.1f} %".replace("-", "−")


FIGURES = (
    Figure("heldout_ce_nats", "held-out CE", ("student", "heldout_ce_nats"), "lower", _decimals(4), "heldout"),
    Figure("heldout_ppl", "perplexity", ("student", "heldout_ppl"), "lower", _decimals(2), "heldout"),
    Figure("kl_to_teacher_nats", "KL to teacher", ("student", "kl_to_teacher_nats"), "lower", _decimals(4), "teacher"),
    Figure("top1_agreement", "agreement", ("student", "top1_agreement"), "higher", _percent, "teacher"),
    Figure("gap_recovered", "gap recovered", ("gap_recovered",), "higher", _percent, "teacher"),
    Figure("tokens_per_s", "tokens/s", ("throughput", "student_tokens_per_s"), "higher", words.count, "machine"),
    Figure("wall_s", "wall time", ("throughput", "wall_s"), None, words.seconds, "machine"),
    Figure("label_bytes_per_token", "label B/token", ("labels", "bytes_per_token"), "lower", _decimals(1), "machine"),
)
"""Wall time has no better side: a run that reuses labels is short for that reason alone."""

BY_NAME = {figure.name: figure for figure in FIGURES}
