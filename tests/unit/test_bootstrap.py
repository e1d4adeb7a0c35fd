"""Intervals of held-out figures, against the normal approximation and against a plain bootstrap over the windows."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.evaluate.bootstrap import Floats, intervals

WINDOWS, SEQ = 400, 32


def drawn(seed: int, student: float = 3.2, baseline: float = 3.5) -> tuple[dict[str, Floats], np.ndarray]:
    """Sums by window; what makes a window hard is the same for all models."""
    random = np.random.default_rng(seed)
    targets = random.integers(1, SEQ + 1, WINDOWS)
    hard = random.normal(0, 0.8, WINDOWS)
    means = {"teacher": 3.0, "student": student, "baseline": baseline}
    return {name: targets * (ce + hard + random.normal(0, 0.05, WINDOWS)) for name, ce in means.items()}, targets


def test_intervals_of_cross_entropy_are_those_of_a_ratio_of_means(seed: int) -> None:
    nats, targets = drawn(seed)
    found = intervals(nats, targets)
    assert found
    for name, sums in nats.items():
        ce = sums.sum() / targets.sum()
        error = (sums - ce * targets).std(ddof=1) * np.sqrt(WINDOWS) / targets.sum()  # delta method
        assert found.heldout_ce_nats[name] == pytest.approx((ce - 1.96 * error, ce + 1.96 * error), abs=0.15 * error)


def test_gap_recovered_is_paired(seed: int) -> None:
    nats, targets = drawn(seed)
    found = intervals(nats, targets)
    assert found and found.gap_recovered
    random, gaps, unpaired = np.random.default_rng(seed + 1), [], []
    for _ in range(2_000):
        one, other = random.integers(WINDOWS, size=(2, WINDOWS))
        t, s, b = (nats[name][one].sum() / targets[one].sum() for name in ("teacher", "student", "baseline"))
        gaps.append((b - s) / (b - t))
        unpaired.append((b - nats["student"][other].sum() / targets[other].sum()) / (b - t))
    expected = np.quantile(gaps, (0.025, 0.975))
    width = expected[1] - expected[0]
    assert found.gap_recovered == pytest.approx(tuple(expected), abs=0.15 * width)
    assert found.gap_recovered[0] < 0.6 < found.gap_recovered[1]
    assert np.ptp(np.quantile(unpaired, (0.025, 0.975))) > 3 * width, "models measured on other windows would say much less"


def test_a_gap_that_may_be_zero_has_no_interval(seed: int) -> None:
    nats, targets = drawn(seed, student=3.0, baseline=3.0)
    found = intervals(nats, targets)
    assert found and found.gap_recovered is None and set(found.heldout_ce_nats) == set(nats)
    del nats["baseline"]
    found = intervals(nats, targets)
    assert found and found.gap_recovered is None


def test_intervals_are_the_same_in_every_run_and_one_window_has_none(seed: int) -> None:
    nats, targets = drawn(seed)
    assert intervals(nats, targets) == intervals(nats, targets)
    assert intervals({name: sums[:1] for name, sums in nats.items()}, targets[:1]) is None
