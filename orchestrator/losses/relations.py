"""Losses on how the states of positions relate to one another: teacher and student may have different widths.

Computed in fp32 at least. Gradients flow into both sides; a teacher's states come without.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import math

import torch
from torch.nn.functional import pdist, smooth_l1_loss

from orchestrator.errors import SpecError
from orchestrator.losses.features import cosine, unit, widened

Tensor = torch.Tensor


def relation(x: Tensor, heads: int) -> Tensor:
    """Log-probabilities [rows, heads, seq, seq] that position i gives to positions j <= i, from states [rows, seq, width].

    log_softmax(x_h x_h^T / sqrt(width / heads)) over j <= i, -inf for j > i; x_h is the h-th of `heads` equal parts of the
    width. Wang et al. 2021 (MiniLMv2), of queries, keys, values or hidden states. `heads` are those of the
    relation and need not be the model's.
    """
    rows, seq, width = x.shape
    if heads < 1 or width % heads:
        raise SpecError(f"relation: states of width {width} cannot be cut into {heads} equal heads")
    parts = widened(x).reshape(rows, seq, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(2, 3) / math.sqrt(width // heads)
    return scores.masked_fill(_later(seq, x.device), -math.inf).log_softmax(-1)


def minilm(teacher: Tensor, student: Tensor, heads: int) -> Tensor:
    """KL(teacher's relation || student's), mean over heads and positions, [rows], of states [rows, seq, either width].

    Wang et al. 2021 (MiniLMv2), of one kind of relation. The first position relates to itself alone and adds
    zero to the mean. Holds some tensors of rows * heads * seq^2 numbers; rows are independent: a caller may cut there.
    """
    if teacher.shape[:2] != student.shape[:2]:
        raise ValueError(f"{tuple(teacher.shape)} states of the teacher for {tuple(student.shape)} of the student")
    later = _later(student.shape[1], student.device)
    p, q = (relation(x, heads).masked_fill(later, 0.0) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).mean((1, 2))


def rkd_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Huber loss (delta 1) between all distances of the teacher's and of the student's points, a scalar, of [n, any width].

    Park et al. 2019 (RKD-D): Euclidean distances, divided by their mean over the n (n - 1) / 2 pairs; the loss is the mean
    over the same. Does not see scale, rotation or translation. Equal points have distance zero, with a gradient of zero. The
    paper's code differs a little: it leaves distances of zero out of the mean and averages the loss over n^2.
    """
    _check_points(teacher, student)
    ours, theirs = (_relative_distances(x) for x in (student, teacher))
    return smooth_l1_loss(ours, theirs, reduction="sum") / max(len(ours), 1)


def rkd_angle(teacher: Tensor, student: Tensor) -> Tensor:
    """Huber loss (delta 1) between the cosines of all angles i-j-k, a scalar, of points [n, any width].

    Park et al. 2019 (RKD-A), mean over the n (n - 1) (n - 2) triples of different points; the paper's code divides by n^3.
    Does not see scale, rotation or translation. Where j is equal to i or k, the cosine is zero, with a gradient of zero.
    Memory: some tensors of n^3 and of n^2 * width numbers, so the caller limits n.
    """
    _check_points(teacher, student)
    n = len(student)
    losses = smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
    to_itself = torch.eye(n, dtype=torch.bool, device=losses.device)
    return losses.masked_fill(to_itself, 0.0).sum() / max(n * (n - 1) * (n - 2), 1)


def gram(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over all n^2 pairs of the squared difference of cosines, a scalar, of states [n, any width].

    The Gram matrix of states of unit length. After Tung and Mori 2019 (similarity-preserving), who normalise the rows of
    the Gram matrix instead. Does not see rotation, nor the length of any state; a state of zero has cosine zero to all.
    """
    _check_points(teacher, student)
    ours, theirs = (x @ x.T for x in (unit(student), unit(teacher)))
    return (ours - theirs).square().sum() / max(ours.numel(), 1)


def cka(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - linear centred kernel alignment, a scalar in [0, 1], of states [n, any width].

    Kornblith et al. 2019: the cosine between the Gram matrices of the centred states. Does not see scale,
    rotation or translation of all. The estimate is biased: with n below the width even unrelated states look alike.
    All states equal (n = 1, say) on either side: 1, without a gradient to that side.
    """
    _check_points(teacher, student)
    ours, theirs = (x @ x.T for x in (_centred(student), _centred(teacher)))
    return cosine(theirs.flatten(), ours.flatten())


def _relative_distances(x: Tensor) -> Tensor:
    """Distances of all pairs of points [n, width] by their mean, [n (n - 1) / 2]; zeros if all points are equal."""
    wide = widened(x)
    distances = pdist(wide) if len(wide) > 1 else wide[:0].sum(-1)  # torch 2.13's backward of pdist crashes at n = 0
    mean = distances.sum() / max(len(distances), 1)
    return distances / torch.where(mean > 0, mean, 1.0)


def _angles(x: Tensor) -> Tensor:
    """[j, i, k]: cosine of the angle at point j between those to i and k, of points [n, width]."""
    wide = widened(x)
    towards = unit(wide[None, :] - wide[:, None])
    return towards @ towards.transpose(1, 2)


def _centred(x: Tensor) -> Tensor:
    """States [n, width] less their mean; exactly zero if all are equal."""
    shifted = widened(x) - widened(x[:1]).detach()
    return shifted - shifted.mean(0)


def _later(seq: int, device: torch.device) -> Tensor:
    """[seq, seq]: whether position j comes after position i."""
    return torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)


def _check_points(teacher: Tensor, student: Tensor) -> None:
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} states of the teacher for {len(student)} of the student")
