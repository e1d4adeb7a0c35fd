"""Length of a training: in steps, in rows, in passes over the available rows."""

from __future__ import annotations

import math
from fractions import Fraction

from orchestrator.errors import SpecError
from orchestrator.spec.train import Train


def with_steps(train: Train, rows: int, section: str) -> Train:
    """`train` with its number of steps, where it asks for epochs over the `rows` that there are for training.

    Raises `SpecError`, naming `section` of the job file, if its warm-up is longer than that.
    """
    if train.epochs is None:
        return train
    steps = steps_of(train, rows)
    if train.warmup_steps > steps:
        raise SpecError(
            f"{section}.warmup_steps: {train.warmup_steps} exceeds the {steps} steps that {section}.epochs {train.epochs:g} is "
            f"({rows} rows, {train.global_batch} a step)"
        )
    return train.model_copy(update={"steps": steps, "epochs": None})


def steps_of(train: Train, rows: int) -> int:
    """Steps of `train` where there are `rows` to train on."""
    if train.steps is not None:
        return train.steps
    return math.ceil(Fraction(str(train.epochs)) * rows / train.global_batch)  # 1.1 x 10 is 11, and not a bit more


def shown_length(train: Train) -> str:
    """As the job file asks for it."""
    return f"{train.epochs:g} epochs" if train.steps is None else f"{train.steps} steps"


def progress_figures(steps: int, train: Train, rows: int, seq_len: int) -> dict[str, float]:
    """Return figures of what `steps` of `train` read of the available `rows` of `seq_len` tokens each."""
    seen = steps * train.global_batch
    return {"rows_seen": seen, "rows_there": rows, "passes": seen / rows, "tokens_seen": seen * seq_len}
