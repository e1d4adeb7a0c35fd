"""The objective over the course of training: what its weights are at each step."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import torch

from orchestrator.losses.divergence import FUNCTIONS, Function
from orchestrator.losses.objective import Mixture
from orchestrator.plan.schedule import scheduled
from orchestrator.spec.objective import Divergence, Objective, Taid

Tensor = torch.Tensor


class ObjectiveSchedule:
    """The `Mixture` of every step; what feedback has taught it is its state, which a checkpoint must keep."""

    def __init__(self, objective: Objective, steps: int, device: torch.device) -> None:
        self._objective, self._steps = objective, steps
        self._divergence = combined(objective.divergences)
        self._taid = None if objective.taid is None else TaidState(objective.taid, steps, device)

    def at(self, step: int) -> Mixture:
        """The objective of optimizer step `step`, counted from 0."""
        alpha = scheduled(self._objective.alpha, step, self._steps)
        temperature = scheduled(self._objective.temperature, step, self._steps)
        return Mixture(
            alpha=alpha,
            soft_weight=(1 - alpha) * (temperature**2 if self._objective.temperature_squared else 1.0),
            temperature=temperature,
            divergence=self._divergence,
            teacher_share=None if self._taid is None else self._taid.share,
        )

    def learn(self, step: int, soft_loss: Tensor) -> None:
        """Take in the mean divergence, a scalar, that step `step` had over the global batch."""
        if self._taid is not None:
            self._taid.update(step, soft_loss)

    def state(self) -> list[float]:
        """Return the values from which `restore` continues exactly as if without interruption; float64 throughout."""
        return [] if self._taid is None else self._taid.values.tolist()

    def restore(self, state: list[float]) -> None:
        if self._taid is not None:
            self._taid.values.copy_(torch.tensor(state, dtype=torch.float64))


class TaidState:
    """The teacher's share of the interpolated target, by feedback. Shing et al. 2025 (TAID), algorithm 1.

    t grows by rate * sigmoid(m) * (1 - t), where m is the running mean of the relative fall of the loss, and never lags
    behind the straight line from start to end.
    """

    def __init__(self, spec: Taid, steps: int, device: torch.device) -> None:
        self._spec, self._steps = spec, steps
        self.values = torch.tensor([spec.start, 0.0, torch.inf], dtype=torch.float64, device=device)
        """t, the running mean, the loss before; kept on the device, so that no step waits for the host."""

    @property
    def share(self) -> Tensor:
        return self.values[0].float()

    def update(self, step: int, loss: Tensor) -> None:
        spec, (share, mean, before) = self._spec, self.values
        loss = loss.double()
        first = torch.isinf(before)
        fall = torch.where(first, 0.0, (before - loss) / before.clamp_min(1e-15))
        mean = torch.where(first, 0.0, spec.momentum * mean + (1 - spec.momentum) * fall)
        ahead = torch.where(first, share, share + spec.rate * torch.sigmoid(mean) * (1 - share))
        line = spec.start + (spec.end - spec.start) * (step + 1) / self._steps
        self.values = torch.stack([ahead.clamp(min=line).clamp(max=spec.end), mean, loss])


def combined(specs: tuple[Divergence, ...]) -> Function:
    """The weighted sum of the divergences that `specs` name, (teacher, student) to [n]."""
    parts = [(spec.weight, FUNCTIONS[spec.kind](spec)) for spec in specs]
    if len(parts) == 1:
        return parts[0][1]

    def weighted(teacher: Tensor, student: Tensor) -> Tensor:
        return torch.stack([weight * part(teacher, student) for weight, part in parts]).sum(0)

    return weighted
