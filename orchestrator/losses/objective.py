"""The training objective: alpha * CE + (1 - alpha) * tau^2 * divergence, with its gradient by the logits.

A divergence sees log-probabilities of events. Which events, follows from the labels: the vocabulary (dense, hidden), the
k ids and everything else (top-k), or the drawn ids (sampled), where the divergence must be linear in the teacher's
probabilities. With g its derivative by the student's log-probabilities and q the student's distribution, the gradient by
the logits is (g - q * sum(g)) / tau, which is written over the logits.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from orchestrator.labels.targets import Dense, Hidden, Sparse, Targets
from orchestrator.losses.divergence import Function

Tensor = torch.Tensor
LEAST_MASS = 1e-30
"""Stands for a probability of zero, so that its logarithm is finite; adds nothing to any divergence in fp32."""
CACHED_ENTRIES = 1 << 18
"""Logits that a CPU takes through the loss at a time, so that what it makes of them stays in its cache."""
LEAST_LOG_REST = -80.0
"""Bounds the log of the student's tail mass, so that its inverse is a number in fp32."""


@dataclass(frozen=True)
class Mixture:
    """The objective at one moment of training: its weights and temperature as they are now."""

    alpha: float = 1.0
    """Weight of the cross entropy; 1 is plain training on hard labels."""
    soft_weight: float = 0.0
    """Weight of the divergence: 1 - alpha, times temperature^2 where the job asks for it."""
    temperature: float = 1.0
    divergence: Function | None = None
    teacher_share: Tensor | None = None
    """t of the interpolated target softmax((1 - t) student + t teacher), a scalar; None: the teacher itself."""

    def score(self, logits: Tensor, target: Tensor, teacher: Targets | None) -> Tensor:
        """Sums over n positions of (loss, CE, divergence), [3]; overwrites `logits` [n, vocab] with the loss's gradient.

        `target` [n] are hard labels, `teacher` soft ones of the same positions.
        """
        if isinstance(teacher, Hidden):
            teacher = Dense(teacher.head(teacher.states))
        if not isinstance(teacher, Dense) or logits.device.type != "cpu":
            return self._score(logits, target, teacher)
        rows = max(1, CACHED_ENTRIES // logits.shape[1])
        parts = zip(logits.split(rows), target.split(rows), teacher.logits.split(rows), strict=True)
        return torch.stack([self._score(part, ids, Dense(said)) for part, ids, said in parts]).sum(0)

    def _score(self, logits: Tensor, target: Tensor, teacher: Sparse | Dense | None) -> Tensor:
        """`score` of what fits a cache."""
        log_probs = _log_softmax_(logits)
        ce = -log_probs.gather(1, target[:, None]).sum()
        soft = torch.zeros_like(ce)
        if teacher is None:
            gradient = log_probs.exp_().mul_(self.alpha)
        elif self.temperature == 1:
            soft, gradient = self._soften_(log_probs, teacher, self.alpha)
        else:
            tempered = _log_softmax_(log_probs / self.temperature)
            soft, pull = self._soften_(tempered, teacher, 0.0)
            gradient = log_probs.exp_().mul_(self.alpha).add_(pull)
        gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -self.alpha))
        return torch.stack([self.alpha * ce + self.soft_weight * soft, ce, soft])

    def _soften_(self, student: Tensor, teacher: Sparse | Dense, base: float) -> tuple[Tensor, Tensor]:
        """Sum of the divergence at `student` [n, vocab]; in place, its weighted gradient plus `base` times q."""
        weight = self.soft_weight / self.temperature
        if isinstance(teacher, Dense):
            value, derivative = self._derivative(self._target(student, teacher), student)
            derivative *= weight
            return value, student.exp_().mul_(base - derivative.sum(-1, keepdim=True)).add_(derivative)
        kept = student.gather(1, teacher.ids)
        if teacher.tail is None:
            value, derivative = self._derivative(_log_of(teacher.probs, kept), kept)
            derivative *= weight
            gradient = student.exp_().mul_(base - derivative.sum(-1, keepdim=True))
            return value, gradient.scatter_add_(1, teacher.ids, derivative)
        rest = _rest(student, teacher.ids, kept)
        said = _log_of(torch.cat([teacher.probs, teacher.tail[:, None]], -1), kept)
        value, derivative = self._derivative(said, torch.cat([kept, rest], -1))
        derivative *= weight
        pull = base - derivative.sum(-1, keepdim=True)
        on_kept = kept.exp() * pull + derivative[:, :-1]
        gradient = student.exp_().mul_(pull + derivative[:, -1:] * (-rest).exp())
        return value, gradient.scatter_(1, teacher.ids, on_kept)

    def _derivative(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the divergence between log-probabilities [n, events], and its derivative by the student's."""
        assert self.divergence is not None
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            value = self.divergence(teacher, leaf).sum()
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    @torch.no_grad()
    def _target(self, student: Tensor, teacher: Dense) -> Tensor:
        """Log-probabilities [n, vocab] at the temperature, at which `student` is given too."""
        log_probs = _log_softmax_(teacher.logits.to(student.dtype, copy=True).div_(self.temperature))
        if self.teacher_share is None:
            return log_probs
        return _log_softmax_(torch.lerp(student, log_probs, self.teacher_share.to(student.dtype)))


def _log_softmax_(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in place."""
    return torch.ops.aten._log_softmax.out(logits, -1, False, out=logits)


def _log_of(probs: Tensor, like: Tensor) -> Tensor:
    return probs.to(like.dtype).clamp_min(LEAST_MASS).log()


def _rest(student: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """Log of the student's mass on all but `ids`, [n, 1]: summed, because 1 minus the mass on them would round away."""
    rest = student.scatter_(1, ids, -math.inf).logsumexp(-1, keepdim=True).clamp_min(LEAST_LOG_REST)
    student.scatter_(1, ids, kept)
    return rest
