"""The training objective: alpha * CE + (1 - alpha) * tau^2 * KL, summed over positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orchestrator.losses.divergence import cross_entropy, sparse_forward_kl

Tensor = torch.Tensor


Soft = tuple[Tensor, Tensor, Tensor | None]
"""A teacher's sparse distribution for n positions: ids [n, k], probabilities [n, k], mass of the tail [n] or None."""


@dataclass(frozen=True)
class Mixture:
    """Weights of the terms; `alpha` = 1 is plain training on hard labels."""

    alpha: float
    temperature: float
    temperature_squared: bool

    def __call__(self, logits: Tensor, target: Tensor, soft: Soft | None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, CE, KL), each summed over the n positions, from `logits` [n, vocab] and hard labels `target` [n]."""
        log_probs = logits.float().log_softmax(-1)
        ce = cross_entropy(log_probs, target).sum()
        if soft is None:
            return ce, ce.detach(), torch.zeros_like(ce).detach()
        at_temperature = log_probs if self.temperature == 1 else (log_probs / self.temperature).log_softmax(-1)
        kd = sparse_forward_kl(at_temperature, *soft).sum()
        scale = self.temperature**2 if self.temperature_squared else 1.0
        return self.alpha * ce + (1 - self.alpha) * scale * kd, ce.detach(), kd.detach()
