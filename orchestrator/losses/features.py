"""Losses between chosen hidden states of teacher and student, and the learned maps between their widths.

States are [n, width], a row per position; every loss is [n], computed in fp32 at least. Gradients flow into both sides, so
that a projector on either can learn; a teacher's states come without.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from orchestrator.errors import SpecError

Tensor = torch.Tensor
Pair = tuple[int, int]
"""(student layer, teacher layer), counted from 1: layer i is the output of block i."""


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the width of the squared difference, [n], of two [n, d]; no state is normalised before.

    Jiao et al. 2020 (TinyBERT). The mean keeps the size of the loss independent of the width.
    """
    _check_widths(teacher, student)
    return (widened(teacher) - widened(student)).square().mean(-1)


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cos of the angle between two [n, d], [n], in [0, 2]: does not see lengths. Sanh et al. 2019 (DistilBERT).

    A state of length zero is at a right angle to everything: 1, without a gradient to itself.
    """
    _check_widths(teacher, student)
    return 1 - (unit(teacher) * unit(student)).sum(-1)


def activation_clone(teacher: Tensor, student: Tensor, projector: Projector | None) -> Tensor:
    """`mse` of the student's FFN activations and the teacher's projected to the student's width, [n]; either is [n, width].

    Hao et al. 2025 (Low-Rank Clone), activation clone. Implemented of LRC: this term for one activation of one layer pair;
    FFN outputs with a bias free projector from teacher to student width, gate and up activations with None where both FFNs
    have the same inner width. Not implemented: the low-rank projection of the teacher's weights, from which LRC makes the
    student's weights, and the clone of the attention's states.

    LRC ties this projector to the weights of the student's down projection; ours is free, and then the term alone is
    minimal at projector = 0 = student. Use it beside a loss on logits, or freeze the projector (`requires_grad_(False)`).
    """
    return mse(teacher if projector is None else projector(teacher), student)


class Projector(nn.Module):
    """A learned linear map without bias from states [..., source] to [..., target], the same for the same seed.

    For a loss in the teacher's width: source student, target teacher. Equal widths start at the identity. Others start
    random with orthonormal rows (target < source: a projection) or orthonormal columns (target > source: keeps lengths and
    angles), uniformly distributed: the Q of a Gaussian matrix's QR with positive diagonal of R. Made in fp32.
    """

    def __init__(self, source: int, target: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(source) if source == target else _orthonormal(target, source, seed))
        """[target, source]"""

    def forward(self, states: Tensor) -> Tensor:
        """[..., target] from `states` [..., source], in the dtype of the weight."""
        if states.shape[-1] != self.weight.shape[1]:
            raise SpecError(f"projector: made for states of width {self.weight.shape[1]}, got {states.shape[-1]}")
        return nn.functional.linear(states.to(self.weight.dtype), self.weight)


def layer_map(teacher_layers: int, student_layers: int, how: Literal["uniform", "last"] | Sequence[Pair]) -> tuple[Pair, ...]:
    """Which student layer learns from which teacher layer; layer i, from 1, is the output of block i.

    uniform: student layer i of S learns from teacher layer i * T / S of T, halves rounded up, the first at least; the last
    layers always meet, and a student deeper than its teacher meets some layers twice. last: the last layers alone. Pairs
    are taken as they are: each student layer once; a teacher layer may teach several.
    """
    t, s = teacher_layers, student_layers
    if min(t, s) < 1:
        raise SpecError(f"layer map: teacher and student need a layer at least, got {t} and {s}")
    if how == "uniform":
        return tuple((i, max(1, (2 * i * t + s) // (2 * s))) for i in range(1, s + 1))
    if how == "last":
        return ((s, t),)
    if isinstance(how, str) or not how:
        raise SpecError(f"layer map: uniform, last or pairs of (student layer, teacher layer), got {how!r}")
    seen: set[int] = set()
    for student, teacher in how:
        if not 1 <= student <= s:
            raise SpecError(f"layer map: student layer {student} of pair ({student}, {teacher}) is not in 1..{s}")
        if not 1 <= teacher <= t:
            raise SpecError(f"layer map: teacher layer {teacher} of pair ({student}, {teacher}) is not in 1..{t}")
        if student in seen:
            raise SpecError(f"layer map: student layer {student} is there twice")
        seen.add(student)
    return tuple((student, teacher) for student, teacher in how)


def unit(states: Tensor) -> Tensor:
    """Rows of [..., d] as unit vectors; one shorter than about 3e-16 (fp32) becomes zero, with a gradient of zero."""
    wide = widened(states)
    squares = wide.square().sum(-1, keepdim=True)
    limits = torch.finfo(wide.dtype)
    some = squares > limits.tiny / limits.eps  # so that neither this nor its gradient overflows
    return torch.where(some, wide / torch.where(some, squares, 1.0).sqrt(), 0.0)


def widened(states: Tensor) -> Tensor:
    """`states` in fp32, or in float64 if they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _check_widths(teacher: Tensor, student: Tensor) -> None:
    if teacher.shape[-1] != student.shape[-1]:
        raise SpecError(
            f"the teacher's states of width {teacher.shape[-1]} and the student's of width {student.shape[-1]} "
            "cannot be compared without a projector"
        )
    if teacher.shape != student.shape:
        raise ValueError(f"{tuple(teacher.shape)} states of the teacher for {tuple(student.shape)} of the student")


def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns], fp32, with orthonormal rows or columns, whichever are fewer; uniform among all such."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu"))
    q = (q * r.diagonal().sign()).float()
    return (q if rows > columns else q.T).contiguous()
