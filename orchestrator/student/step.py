"""The result of an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as a rank sees it."""

    means: torch.Tensor
    """[5]: means of `TERMS` over the global batch, the same on every rank."""
    losses: torch.Tensor
    """[micro_batches]: the losses that this rank computed, if it computes the loss."""
    applied: bool
    """False if the gradient was not finite; weights and optimizer are then as they were. The same on every rank."""
