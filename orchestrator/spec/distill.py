"""What the teacher says, how it is stored, and what the student is asked to learn from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from orchestrator.spec.base import Spec

Temperature = Annotated[float, Field(gt=0, le=1000)]


class LabelsBase(Spec):
    temperatures: tuple[Temperature, ...] = Field(default=(1.0,), min_length=1)
    """Temperatures the labels are exact at; an objective may use any of these without relabelling."""
    run_ahead: int | None = Field(default=None, ge=1)
    """Shards the teacher may label ahead of the student; null: as fast as it can (labels are kept anyway)."""

    @field_validator("temperatures")
    @classmethod
    def _told_apart(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{t:g}" for t in values}) < len(values):
            raise ValueError("two temperatures are the same to six digits")
        return values


class SampledLabels(LabelsBase):
    """Ids drawn from the teacher's distribution, with multiplicities: unbiased at any vocabulary size."""

    kind: Literal["sampled"] = "sampled"
    samples: int = Field(default=50, ge=1, le=255)
    """Draws per position."""
    method: Literal["systematic", "multinomial"] = "systematic"


class TopkLabels(LabelsBase):
    """The k most likely ids with log-probabilities and the mass of the tail."""

    kind: Literal["topk"]
    k: int = Field(default=50, ge=1, le=65535)


Labels = Annotated[SampledLabels | TopkLabels, Field(discriminator="kind")]


class Objective(Spec):
    """alpha * CE(hard labels) + (1 - alpha) * temperature^2 * KL(teacher || student at that temperature)."""

    alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight of the hard-label cross entropy."""
    temperature: Temperature = 1.0
    temperature_squared: bool = True
    """Multiply the soft term by temperature^2 (Hinton et al. 2015), which keeps its gradient scale."""
