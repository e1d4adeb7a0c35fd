"""Divergences between a teacher's sparse targets and a student's logits, per position. Pure functions, fp32.

Shapes: n positions, vocab ids, k ids kept of the teacher.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def cross_entropy(log_probs: Tensor, target: Tensor) -> Tensor:
    """-log q(target): [n] from `log_probs` [n, vocab] and `target` [n]."""
    return -log_probs.gather(1, target[:, None]).squeeze(1)


def sparse_forward_kl(log_probs: Tensor, ids: Tensor, probs: Tensor, tail: Tensor | None) -> Tensor:
    """KL(t || q) in nats, [n], of `probs` [n, k] at `ids` [n, k] against the student's `log_probs` [n, vocab].

    With `tail` [n] everything outside `ids` is one more event on both sides: a KL on k + 1 events, a lower bound of the
    full one. Without it `probs` is an unbiased draw of the whole distribution: the value is the KL to the draw, the
    gradient is in expectation that of the full KL.
    """
    student = log_probs.gather(1, ids)
    kl = (torch.xlogy(probs, probs) - probs * student).sum(-1)
    if tail is None:
        return kl
    return kl + torch.xlogy(tail, tail) - tail * log_remainder(student)


def log_remainder(log_probs: Tensor) -> Tensor:
    """log(1 - sum of exp(`log_probs` [n, k])), [n], bounded below where rounding leaves nothing."""
    return torch.log((1 - log_probs.exp().sum(-1)).clamp_min(1e-9))
