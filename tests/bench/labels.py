"""Draws from a teacher as the labels that the benchmarks give to a loss."""

from __future__ import annotations

import torch

from orchestrator.labels.layout import Frame, tempered
from orchestrator.labels.sampled import Sampled
from orchestrator.labels.targets import Sparse
from orchestrator.spec.labels import SampledLabels


def merged(drawn: torch.Tensor, vocab_size: int) -> Sparse:
    """Targets of `drawn` [n, samples], ascending ids: every id once, with its share of the draws."""
    kind = Sampled(SampledLabels(samples=drawn.shape[1]), Frame(vocab_size, len(drawn)))
    return kind.targets({tempered("ids", 1.0): drawn.numpy()[None]}, 1.0).map(lambda t: t[0])
