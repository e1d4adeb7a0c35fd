"""Token-level differences between models and their teacher: the distribution of KL, and agreement by the teacher's entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SMALLEST_NATS = 1e-4
"""KL below is rounding; it is counted together."""
BINS_PER_DECADE = 5
ENTROPY_BINS = 10
QUANTILES = (0.5, 0.75, 0.9, 0.97)


@dataclass(frozen=True)
class TeacherComparison:
    """Comparison of one model with the teacher, by position."""

    kl_nats: Floats
    """[positions]: KL(teacher ‖ model) of the predicted distributions."""
    same_top1: npt.NDArray[np.bool_]
    """[positions]: whether both hold the same token most likely."""


def by_token(entropy: Floats, models: Mapping[str, TeacherComparison]) -> dict[str, Any]:
    """Return the section `heldout` of report.json, from the teacher's `entropy` [positions] in nats and `models` by name."""
    return {
        "tokens": len(entropy),
        "kl_histogram": kl_histogram({name: model.kl_nats for name, model in models.items()}),
        "kl_quantiles": {
            name: {f"p{100 * q:.0f}": float(v) for q, v in zip(QUANTILES, np.quantile(model.kl_nats, QUANTILES), strict=True)}
            for name, model in models.items()
        },
        "by_teacher_entropy": by_entropy(entropy, models),
    }


def kl_histogram(kl_nats: Mapping[str, Floats]) -> dict[str, list[float]]:
    """Tokens by KL: `edges_nats` [bins + 1], equally far apart on a logarithmic scale but for the first, 0, and counts [bins]
    of each model by name, which sum to its positions."""
    largest = max(float(values[np.isfinite(values)].max(initial=0.0)) for values in kl_nats.values())
    first, last = (round(BINS_PER_DECADE * math.log10(v)) for v in (SMALLEST_NATS, max(largest, 10 * SMALLEST_NATS)))
    edges = np.array([0.0, *(10 ** (i / BINS_PER_DECADE) for i in range(first, last + 2))])
    counts = {name: np.histogram(np.clip(values, 0.0, edges[-1]), edges)[0] for name, values in kl_nats.items()}
    return {"edges_nats": edges.tolist(), **{name: c.tolist() for name, c in counts.items()}}


def by_entropy(entropy: Floats, models: Mapping[str, TeacherComparison]) -> dict[str, Any]:
    """Agreement and mean KL in bins of the teacher's entropy that hold equally many tokens; equal entropies share a bin."""
    # Edges are entropies that occur, so that no bin is empty.
    edges = np.unique(np.quantile(entropy, np.linspace(0, 1, ENTROPY_BINS + 1), method="lower"))
    bin_of = np.clip(np.searchsorted(edges, entropy, side="right") - 1, 0, max(len(edges) - 2, 0))
    tokens = np.bincount(bin_of)

    def means(values: npt.NDArray[Any]) -> list[float]:
        return (np.bincount(bin_of, values.astype(np.float64)) / tokens).tolist()

    return {
        "edges_nats": edges.tolist(),
        "tokens": tokens.tolist(),
        "entropy_nats": means(entropy),
        **{
            name: {"top1_agreement": means(model.same_top1), "kl_to_teacher_nats": means(model.kl_nats)}
            for name, model in models.items()
        },
    }
