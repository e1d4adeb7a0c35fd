"""The learning rate as a pure function of the step: nothing to checkpoint, nothing to drift."""

from __future__ import annotations

import math

from orchestrator.spec.objective import Schedule
from orchestrator.spec.train import Train

WSD_DECAY = 0.2
"""Share of the steps after warm-up in which warmup-stable-decay decays (Hu et al. 2024, MiniCPM: 0.1 to 0.2)."""


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to the final share."""
    assert train.steps is not None
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    done = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    falling = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "wsd": min(1.0, (1 - done) / WSD_DECAY),
    }[train.schedule]
    return train.learning_rate * (train.final_lr_fraction + (1 - train.final_lr_fraction) * falling)


def scheduled(value: float | Schedule, step: int, steps: int) -> float:
    """Return `value` at optimizer step `step` of `steps`, counted from 0; the last step has the end value."""
    if not isinstance(value, Schedule):
        return value
    moving = steps - 1 - value.warmup_steps
    progress = min(max((step - value.warmup_steps) / moving, 0.0), 1.0) if moving > 0 else float(step >= steps - 1)
    if value.kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return value.start + (value.end - value.start) * progress
