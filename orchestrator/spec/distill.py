"""What the teacher says, how it is stored, and what the student is asked to learn from it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from orchestrator.spec.base import Spec

Temperature = Annotated[float, Field(gt=0, le=1000)]
Share = Annotated[float, Field(gt=0, lt=1)]


class LabelsBase(Spec):
    run_ahead: int | None = Field(default=None, ge=1)
    """Shards the teacher may label ahead of the student; null: as fast as it can (labels are kept anyway)."""


class TemperedLabels(LabelsBase):
    """Labels that hold the teacher's distribution at listed temperatures only."""

    temperatures: tuple[Temperature, ...] = Field(default=(1.0,), min_length=1)
    """Temperatures the labels are exact at; an objective may use any of these without relabelling."""

    @field_validator("temperatures")
    @classmethod
    def _told_apart(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{t:g}" for t in values}) < len(values):
            raise ValueError("two temperatures are the same to six digits")
        return values


class SampledLabels(TemperedLabels):
    """Ids drawn from the teacher's distribution, with multiplicities: unbiased at any vocabulary size."""

    kind: Literal["sampled"] = "sampled"
    samples: int = Field(default=50, ge=1, le=255)
    """Draws per position."""
    method: Literal["systematic", "multinomial"] = "systematic"


class TopkLabels(TemperedLabels):
    """The k most likely ids with log-probabilities and the mass of the tail."""

    kind: Literal["topk"]
    k: int = Field(default=50, ge=1, le=65535)
    renormalize: bool = False
    """Forget the tail and scale the k probabilities to one: common, biased, and worse than no distillation for small k."""


class DenseLabels(LabelsBase):
    """All logits, exact at any temperature; for small vocabularies and for tests."""

    kind: Literal["dense"]
    dtype: Literal["fp16", "fp32"] = "fp16"


class HiddenLabels(LabelsBase):
    """The teacher's last hidden state, to which the student's side applies the teacher's own head: exact at any temperature."""

    kind: Literal["hidden"]
    codec: Literal["fp16", "int8"] = "fp16"
    """int8 keeps one fp32 scale per position."""


Labels = Annotated[SampledLabels | TopkLabels | DenseLabels | HiddenLabels, Field(discriminator="kind")]


class DivergenceBase(Spec):
    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of the soft term; the weights of all divergences sum to 1."""


class ForwardKl(DivergenceBase):
    """KL(teacher || student), the only one that is unbiased on sampled labels."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKl(DivergenceBase):
    """KL(student || teacher)."""

    kind: Literal["reverse_kl"]


class TotalVariation(DivergenceBase):
    """Half the sum of absolute differences."""

    kind: Literal["tvd"]


class Jsd(DivergenceBase):
    """Generalised Jensen-Shannon divergence; beta 0 is forward, 1 reverse KL."""

    kind: Literal["jsd"]
    beta: float = Field(default=0.5, ge=0, le=1)


class SkewKl(DivergenceBase):
    """KL(teacher || skew teacher + (1 - skew) student)."""

    kind: Literal["skew_kl"]
    skew: Share = 0.1


class ReverseSkewKl(DivergenceBase):
    """KL(student || skew student + (1 - skew) teacher)."""

    kind: Literal["reverse_skew_kl"]
    skew: Share = 0.1


class AdaptiveKl(DivergenceBase):
    """Forward and reverse KL, weighted per position by the gaps over the teacher's head and tail."""

    kind: Literal["akl"]
    head_mass: Share = 0.5


Divergence = Annotated[
    ForwardKl | ReverseKl | Jsd | SkewKl | ReverseSkewKl | TotalVariation | AdaptiveKl, Field(discriminator="kind")
]


class Schedule(Spec):
    """A value that moves from `start` to `end` over the steps of training, after `warmup_steps` at `start`."""

    kind: Literal["linear", "cosine"] = "linear"
    start: float
    end: float
    warmup_steps: int = Field(default=0, ge=0)


def _form(value: object) -> str:
    return "Schedule" if isinstance(value, dict | Schedule) else "number"


class Taid(Spec):
    """Temporally adaptive interpolated distillation: the target moves from the student's own distribution to the teacher's.

    Shing et al. 2025. The teacher's share t never falls; it follows a straight line from `start` to `end` and runs ahead
    of it while the loss keeps falling.
    """

    start: float = Field(default=0.4, ge=0, le=1)
    end: float = Field(default=1.0, gt=0, le=1)
    rate: float = Field(default=5e-4, gt=0)
    """How much one step may add to t beyond the line."""
    momentum: float = Field(default=0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _rises(self) -> Taid:
        if self.start > self.end:
            raise ValueError(f"start {self.start} is above end {self.end}")
        return self


class Objective(Spec):
    """alpha * CE(hard labels) + (1 - alpha) * temperature^2 * divergence of the student from its teacher."""

    alpha: Annotated[
        Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[Schedule, Tag("Schedule")], Discriminator(_form)
    ] = 0.1
    """Weight of the hard-label cross entropy."""
    temperature: Annotated[
        Annotated[Temperature, Tag("number")] | Annotated[Schedule, Tag("Schedule")], Discriminator(_form)
    ] = 1.0
    temperature_squared: bool = True
    """Multiply the soft term by temperature^2 (Hinton et al. 2015), which keeps its gradient scale."""
    divergences: tuple[Divergence, ...] = Field(default=(ForwardKl(),), min_length=1)
    taid: Taid | None = None

    @field_validator("alpha")
    @classmethod
    def _alpha_is_a_share(cls, value: float | Schedule) -> float | Schedule:
        if isinstance(value, Schedule) and not (0 <= value.start <= 1 and 0 <= value.end <= 1):
            raise ValueError("a schedule of alpha must stay between 0 and 1")
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature_is_positive(cls, value: float | Schedule) -> float | Schedule:
        if isinstance(value, Schedule) and not (0 < value.start <= 1000 and 0 < value.end <= 1000):
            raise ValueError("a schedule of the temperature must stay above 0 and at most 1000")
        return value

    @field_validator("divergences")
    @classmethod
    def _weights_sum(cls, values: tuple[Divergence, ...]) -> tuple[Divergence, ...]:
        total = sum(d.weight for d in values)
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"the weights of the divergences sum to {total:g} instead of 1")
        return values


def unserved(labels: Labels, objective: Objective) -> str | None:
    """Why `objective` cannot be had from `labels`; None if it can."""
    kind, temperature = labels.kind, objective.temperature
    if isinstance(labels, TemperedLabels):
        listed = ", ".join(str(t) for t in labels.temperatures)
        if isinstance(temperature, Schedule):
            return f"objective.temperature: a schedule needs labels.kind dense or hidden; {kind} is exact at [{listed}] only"
        if temperature not in labels.temperatures:
            return f"objective.temperature {temperature} is not in labels.temperatures [{listed}]"
        if objective.taid is not None:
            return f"objective.taid: interpolates whole distributions, of which {kind} labels keep a part; use dense or hidden"
    if isinstance(labels, SampledLabels) or (isinstance(labels, TopkLabels) and labels.renormalize):
        unsound = [d.kind for d in objective.divergences if d.kind != "forward_kl"]
        if unsound:
            how = (
                "a draw is unbiased only where the teacher's probabilities enter linearly"
                if kind == "sampled"
                else "no tail is kept"
            )
            return f"objective.divergences: {unsound[0]} cannot be had from {kind} labels: {how}; use topk, dense or hidden"
    return None
