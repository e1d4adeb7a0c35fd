"""A loss between distributions over different vocabularies."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

Tensor = torch.Tensor


def uld(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of |sorted p - sorted q|, [n], in [0, 2], of probabilities p [n, teacher's vocab] and q [n, student's vocab].

    Boizard et al. 2024 (ULD), the closed form of the Wasserstein distance at unit costs: both are sorted downwards, and the
    smaller vocabulary is filled up with zeros. Which token has which probability is not seen. Which position of the teacher
    belongs to which of the student, is the caller's matter: both have n. At ties the gradient is one of several.

    There is no variant for a teacher's top-k and tail: sorted, a value is the tail's only by its rank, so the sum depends on
    how the tail is spread, which those labels do not keep. The tail as one more event would be sorted in among the single
    tokens, as heavy as the heaviest; kept apart it gives a lower bound, which sees nothing of the tail but its mass. Samples
    are no way out either: sorting is not linear, so their mean is biased.
    """
    p, q = (t.to(torch.promote_types(t.dtype, torch.float32)).sort(-1, descending=True).values for t in (teacher, student))
    vocab = max(p.shape[-1], q.shape[-1])
    return (pad(p, (0, vocab - p.shape[-1])) - pad(q, (0, vocab - q.shape[-1]))).abs().sum(-1)
