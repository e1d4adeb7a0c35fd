"""Draws from a teacher as the labels that the benchmarks give to a loss."""

from __future__ import annotations

import torch

from orchestrator.labels.targets import Sparse


def merged(drawn: torch.Tensor) -> Sparse:
    """Targets of `drawn` [n, samples], ascending ids: every id once, with its share of the draws."""
    n, samples = drawn.shape
    place = torch.zeros_like(drawn)
    place[:, 1:] = (drawn[:, 1:] != drawn[:, :-1]).cumsum(1)
    ids = torch.zeros_like(drawn).scatter_(1, place, drawn)
    probs = torch.zeros(n, samples).scatter_add_(1, place, torch.full((n, samples), 1 / samples))
    most = int(place.max()) + 1
    return Sparse(ids[:, :most], probs[:, :most], tail=None)
