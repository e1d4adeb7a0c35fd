"""The training objective: alpha * CE + (1 - alpha) * tau^2 * divergence, with its gradient by the logits.

A divergence sees log-probabilities of events. Which events, follows from the labels: the vocabulary (dense, hidden), the
k ids and everything else (top-k), or the drawn ids (sampled), where the divergence must be linear in the teacher's
probabilities. With g its derivative by the student's log-probabilities and q the student's distribution, the gradient by
the logits is (g - q * sum(g)) / tau, which is written over the logits.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from dataclasses import dataclass

import torch

from orchestrator.labels.targets import Dense, Hidden, Sparse, Targets
from orchestrator.losses.divergence import Function

Tensor = torch.Tensor
LEAST_MASS = 1e-30
"""Stands for a probability of zero, so that its logarithm is finite; adds nothing to any divergence in fp32."""
CACHED_ENTRIES = 1 << 18
"""Logits that a CPU takes through the loss at a time, so that what it makes of them stays in its cache."""
LEAST_REMAINDER = 1e-9
"""Bounds the student's tail mass where rounding leaves nothing of it."""


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
        hard = log_probs.new_full((len(target), 1), -self.alpha)
        if teacher is None:
            log_probs.exp_().mul_(self.alpha).scatter_add_(1, target[:, None], hard)
            return torch.stack([self.alpha * ce, ce, torch.zeros_like(ce)])
        tempered = log_probs if self.temperature == 1 else _log_softmax_(log_probs / self.temperature)
        soft, derivative, ids = self._derivative(tempered, teacher)
        derivative *= self.soft_weight / self.temperature
        pull = -derivative.sum(-1, keepdim=True)
        if tempered is log_probs:
            gradient = log_probs.exp_().mul_(self.alpha + pull)
        else:
            gradient = log_probs.exp_().mul_(self.alpha).addcmul_(tempered.exp_(), pull)
        gradient.scatter_add_(1, target[:, None], hard)
        gradient.add_(derivative) if ids is None else gradient.scatter_add_(1, ids, derivative)
        return torch.stack([self.alpha * ce + self.soft_weight * soft, ce, soft])

    def _derivative(self, student: Tensor, teacher: Sparse | Dense) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sum of the divergence, its derivative by `student` [n, vocab] at `ids` [n, k]; None: at every id."""
        assert self.divergence is not None
        with torch.enable_grad():
            if isinstance(teacher, Sparse):
                leaf = student.gather(1, teacher.ids).requires_grad_()
                value = self.divergence(_teacher_events(teacher, student.dtype), _student_events(teacher, leaf)).sum()
            else:
                leaf = student.detach().requires_grad_()
                value = self.divergence(self._target(leaf.detach(), teacher), leaf).sum()
        (derivative,) = torch.autograd.grad(value, leaf)
        return value.detach(), derivative, teacher.ids if isinstance(teacher, Sparse) else None

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


def _teacher_events(teacher: Sparse, dtype: torch.dtype) -> Tensor:
    """Log-probabilities [n, k], with the tail [n, k + 1]."""
    probs = teacher.probs if teacher.tail is None else torch.cat([teacher.probs, teacher.tail[:, None]], -1)
    return probs.to(dtype).clamp_min(LEAST_MASS).log()


def _student_events(teacher: Sparse, kept: Tensor) -> Tensor:
    """The student's log-probabilities of the same events, from those of the ids, `kept` [n, k]."""
    if teacher.tail is None:
        return kept
    remainder = (1 - kept.exp().sum(-1, keepdim=True)).clamp_min(LEAST_REMAINDER)
    return torch.cat([kept, remainder.log()], -1)
