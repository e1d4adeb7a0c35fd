"""How far held-out figures would move on other held-out text: percentile bootstrap over windows (Efron & Tibshirani 1993).

Windows are drawn with replacement, the same ones for all models, so that what makes a window hard for all of them cancels
in differences. Windows of one document are taken as independent, which makes the intervals somewhat too narrow where
documents are much longer than a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 4_000
LEVEL = 0.95
_DRAWN_AT_ONCE = 4_000_000


class Intervals(NamedTuple):
    """The middle `LEVEL` of what the resamples give."""

    heldout_ce_nats: dict[str, Interval]
    """By model."""
    gap_recovered: Interval | None
    """None without a baseline, and where the windows do not tell whether the baseline is worse than the teacher."""


def intervals(nats: Mapping[str, Floats], targets: npt.NDArray[np.int64]) -> Intervals | None:
    """Intervals from the sums of cross entropy over each window, `nats` [windows] by model, and its `targets` [windows].

    `targets` are counts of tokens. None for a single window, of which nothing can be drawn but itself.
    """
    if len(targets) < 2:
        return None
    sums = np.stack([*nats.values(), targets.astype(np.float64)], 1)
    drawn = np.concatenate([counts @ sums for counts in _draws(len(targets))])
    ce = dict(zip(nats, (drawn[:, :-1] / drawn[:, -1:]).T, strict=True))
    return Intervals({name: _middle(values) for name, values in ce.items()}, _gap_recovered(ce))


def _gap_recovered(ce: Mapping[str, Floats]) -> Interval | None:
    if "baseline" not in ce:
        return None
    gap = ce["baseline"] - ce["teacher"]
    if _middle(gap)[0] <= 0:
        return None  # a ratio whose denominator may be zero has no finite interval
    return _middle((ce["baseline"] - ce["student"]) / gap)


def _draws(windows: int) -> Iterator[Floats]:
    """How often each window is drawn, [resamples, windows] in chunks; the same in every run."""
    random = np.random.default_rng(0)
    chunk = max(1, _DRAWN_AT_ONCE // windows)
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        yield random.multinomial(windows, np.full(windows, 1 / windows), size).astype(np.float64)


def _middle(values: Floats) -> Interval:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
