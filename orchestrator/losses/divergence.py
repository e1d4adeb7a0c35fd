"""Divergences of a student from its teacher, per position, in nats. Pure functions of log-probabilities.

Both arguments are [n, events], the same events on both sides: the whole vocabulary, or the ids that a label keeps with
everything else as one more event (a lower bound of the divergence on the vocabulary, by the data processing inequality).
Every function returns [n]. What the teacher says is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Tensor = torch.Tensor
Function = Callable[[Tensor, Tensor], Tensor]


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p || q): covers all that the teacher finds likely."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(q || p): seeks the teacher's modes."""
    return (student.exp() * (student - teacher)).sum(-1)


def jsd(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; the ends are forward (0) and reverse (1) KL.

    Agarwal et al. 2024 (GKD), equation 1. Between the ends the value goes to zero with beta or 1 - beta.
    """
    if beta in (0, 1):
        return reverse_kl(teacher, student) if beta else forward_kl(teacher, student)
    middle = _mixture(teacher, student, beta)
    return beta * forward_kl(teacher, middle) + (1 - beta) * forward_kl(student, middle)


def skew_kl(teacher: Tensor, student: Tensor, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q): a forward KL with bounded gradients. Ko et al. 2024 (DistiLLM), section 3.1."""
    return forward_kl(teacher, _mixture(teacher, student, skew))


def reverse_skew_kl(teacher: Tensor, student: Tensor, skew: float) -> Tensor:
    """KL(q || (1 - skew) p + skew q). Ko et al. 2024 (DistiLLM), section 3.1."""
    return forward_kl(student, _mixture(student, teacher, skew))


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]. Wen et al. 2023 (f-divergence distillation)."""
    return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def adaptive_kl(teacher: Tensor, student: Tensor, head_mass: float) -> Tensor:
    """Forward and reverse KL, each position weighted by where the two still differ. Wu et al. 2025 (AKL), section 4.

    The gap sum |p - q| over the teacher's head, the most likely events that together reach `head_mass`, weights the
    forward KL, which fits the head first; the gap over the tail weights the reverse KL.
    """
    with torch.no_grad():
        ranked, order = teacher.exp().sort(-1, descending=True)
        gap = (ranked - student.exp().gather(-1, order)).abs()
        in_head = ranked.cumsum(-1) - ranked < head_mass
        head = (gap * in_head).sum(-1)
        forward_share = head / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return forward_share * forward_kl(teacher, student) + (1 - forward_share) * reverse_kl(teacher, student)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share exp(first) + (1 - share) exp(second))"""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


FUNCTIONS: dict[str, Callable[[Any], Function]] = {
    "forward_kl": lambda _: forward_kl,
    "reverse_kl": lambda _: reverse_kl,
    "jsd": lambda spec: partial(jsd, beta=spec.beta),
    "skew_kl": lambda spec: partial(skew_kl, skew=spec.skew),
    "reverse_skew_kl": lambda spec: partial(reverse_skew_kl, skew=spec.skew),
    "tvd": lambda _: total_variation,
    "akl": lambda spec: partial(adaptive_kl, head_mass=spec.head_mass),
}
"""By kind: the function that a `Divergence` of the job file asks for."""
