"""A teacher's output for a few rows, before it becomes labels."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from orchestrator.errors import DataError
from orchestrator.plan.memory import head_rows


@dataclass(frozen=True)
class Answer:
    """Last hidden states, and the head that makes logits of them."""

    states: torch.Tensor
    """[rows, seq, width]"""
    head: Callable[[torch.Tensor], torch.Tensor]
    """[n, width] to logits [n, vocab], fp32"""
    vocab_size: int
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Inner features by name, [rows, seq, width]."""

    def logits(self) -> Iterator[torch.Tensor]:
        """Logits of all positions, row after row, in chunks [c, vocab]; raises `DataError` for one that is no number."""
        done = 0
        for states in self.states.flatten(0, 1).split(head_rows(self.vocab_size, self.states.is_cuda)):
            logits = self.head(states)
            # The sum of a position is non-finite if any entry is; inf - inf is NaN, so nothing can hide.
            bad = ~torch.isfinite(logits.sum(-1))
            if bool(bad.any()):
                row = (done + int(bad.nonzero()[0])) // self.states.shape[1]
                raise DataError(f"teacher logits are not finite, first in row {row}")
            done += len(states)
            yield logits

    @classmethod
    def of_logits(cls, logits: torch.Tensor) -> Answer:
        """The answer of a teacher that gives logits [rows, seq, vocab] right away."""
        return cls(logits, lambda states: states.float(), logits.shape[-1])
