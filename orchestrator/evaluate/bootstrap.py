"""Confidence intervals of held-out figures: percentile bootstrap over documents (Efron & Tibshirani 1993).

Documents are drawn with replacement, each with all its windows, which are alike: a cluster bootstrap (Davison & Hinkley 1997,
3.8). The same ones are drawn for all models, so that what makes a document hard for all cancels in differences. A window
counts as of the document that its first target belongs to. Of few documents the percentiles are taken further out, as far as
Student's t is wider than the normal distribution (expanded percentile interval; Hesterberg 2015, "What Teachers Should Know
About the Bootstrap").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 4_000
LEVEL = 0.95
SURELY = 0.001
"""Share of the resamples that may have no gap between baseline and teacher, where an interval of what is recovered is given."""
_DRAWN_AT_ONCE = 4_000_000


class Intervals(NamedTuple):
    """Confidence intervals at level `LEVEL`."""

    heldout_ce_nats: dict[str, Interval]
    """By model."""
    gap_recovered: Interval | None
    """None without teacher or baseline, and where the documents do not tell whether the baseline is worse than the teacher."""


def intervals(nats: Mapping[str, Floats], targets: npt.NDArray[np.int64], documents: Sequence[bytes]) -> Intervals | None:
    """Intervals from the sums of cross entropy over each window, `nats` [windows] by model, and its `targets` [windows].

    `targets` are counts of tokens, `documents` [windows] say whose the windows are. None for a single document, of which
    nothing can be drawn but itself.
    """
    names, of = np.unique(np.array(documents), return_inverse=True)
    if len(names) < 2:
        return None
    sums = np.zeros((len(names), len(nats) + 1))
    np.add.at(sums, of, np.stack([*nats.values(), targets.astype(np.float64)], 1))
    drawn = np.concatenate([counts @ sums for counts in _draws(len(names))])
    ce = dict(zip(nats, (drawn[:, :-1] / drawn[:, -1:]).T, strict=True))
    tail = _tail(len(names))
    return Intervals({name: _middle(values, tail) for name, values in ce.items()}, _gap_recovered(ce, tail))


def _gap_recovered(ce: Mapping[str, Floats], tail: float) -> Interval | None:
    if not {"teacher", "student", "baseline"} <= ce.keys():
        return None
    gap = ce["baseline"] - ce["teacher"]
    if np.quantile(gap, SURELY) <= 0:
        return None  # a ratio whose denominator may be zero has no finite interval
    return _middle((ce["baseline"] - ce["student"]) / gap, tail)


def _draws(documents: int) -> Iterator[Floats]:
    """Yield how often each document is drawn, [resamples, documents] in chunks; the same in every run."""
    random = np.random.default_rng(0)
    chunk = max(1, _DRAWN_AT_ONCE // documents)
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        yield random.multinomial(documents, np.full(documents, 1 / documents), size).astype(np.float64)


def _tail(documents: int) -> float:
    """Share of the resamples on either side of an interval."""
    from scipy.stats import norm, t

    beyond = t.ppf((1 - LEVEL) / 2, documents - 1) * np.sqrt(documents / (documents - 1))
    return float(norm.cdf(beyond))


def _middle(values: Floats, tail: float) -> Interval:
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)
