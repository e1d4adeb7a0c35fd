"""The teacher signals that a loss takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

TARGET_LOG_PROBS = "target_log_probs"
"""Column beside top-k labels of held-out rows: the log-probability of each target [seq], fp32, be it among the k ids or not."""


@dataclass(frozen=True)
class Sparse:
    """A distribution per position on k of the vocabulary's ids; unused places hold id 0 with probability 0."""

    ids: torch.Tensor
    """[..., k], int64"""
    probs: torch.Tensor
    """[..., k], fp32"""
    tail: torch.Tensor | None
    """[...], fp32: mass of all other ids; None where the k ids stand for the whole distribution, as a draw does."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Sparse:
        """The same targets with `change` applied to every tensor that has an entry per position."""
        return Sparse(change(self.ids), change(self.probs), None if self.tail is None else change(self.tail))


@dataclass(frozen=True)
class Dense:
    """All logits of the teacher."""

    logits: torch.Tensor
    """[..., vocab], fp16 or fp32"""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Dense:
        return Dense(change(self.logits))


@dataclass(frozen=True)
class Hidden:
    """The teacher's last hidden state, and the head that makes logits of it."""

    states: torch.Tensor
    """[..., width]"""
    head: Callable[[torch.Tensor], torch.Tensor]
    """[n, width] to logits [n, vocab], fp32"""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Hidden:
        return Hidden(change(self.states), self.head)


Targets = Sparse | Dense | Hidden
"""The teacher's answer at some positions, in the form that a loss takes."""
