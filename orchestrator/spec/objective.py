"""The objective that the student is trained on, and which labels can serve it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from orchestrator.spec.base import Spec
from orchestrator.spec.labels import (
    Labels,
    Part,
    SampledLabels,
    Temperature,
    TemperedLabels,
    TopkLabels,
    feature_name,
    kept_features,
)

Share = Annotated[float, Field(gt=0, lt=1)]


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


class FeatureTermBase(Spec):
    """A loss between inner layers of student and teacher, beside the one on their distributions."""

    weight: float = Field(gt=0)
    part: Part = "hidden"
    layers: Annotated[
        Annotated[Literal["uniform", "last"], Tag("name")] | Annotated[tuple[tuple[int, int], ...], Tag("pairs")],
        Discriminator(lambda value: "pairs" if isinstance(value, list | tuple) else "name"),
    ] = "last"
    """Pairs [student layer, teacher layer], counted from 1; uniform: every student layer; last: the last of both."""


class MseTerm(FeatureTermBase):
    """Mean squared difference, the student's states mapped to the teacher's width."""

    kind: Literal["mse"]


class CosineTerm(FeatureTermBase):
    """1 - cosine, the student's states mapped to the teacher's width."""

    kind: Literal["cosine"]


class CloneTerm(FeatureTermBase):
    """Mean squared difference, the teacher's states mapped to the student's width by a fixed map (after Low-Rank Clone)."""

    kind: Literal["clone"]
    part: Part = "ffn"


class MinilmTerm(FeatureTermBase):
    """KL between the relations of positions to earlier ones, per relation head (MiniLMv2)."""

    kind: Literal["minilm"]
    part: Part = "values"
    heads: int = Field(default=4, ge=1)


class RelationTerm(FeatureTermBase):
    """Relations among some positions of each row: distances or angles (RKD), cosines (Gram), centred kernel alignment."""

    kind: Literal["rkd_distance", "rkd_angle", "gram", "cka"]
    points: int = Field(default=64, ge=2, le=512)
    """Positions of a row, evenly spread; angles cost the cube of it."""


FeatureTerm = Annotated[MseTerm | CosineTerm | CloneTerm | MinilmTerm | RelationTerm, Field(discriminator="kind")]


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
    """Largest increase of t that one step may add beyond the line."""
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
    features: tuple[FeatureTerm, ...] = ()
    """Losses on inner layers, added with their weights."""

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
    return _unserved_temperature(labels, objective) or _unsound_divergence(labels, objective) or _unkept(labels, objective)


def _unserved_temperature(labels: Labels, objective: Objective) -> str | None:
    if not isinstance(labels, TemperedLabels):
        return None
    kind, temperature, listed = labels.kind, objective.temperature, ", ".join(str(t) for t in labels.temperatures)
    if isinstance(temperature, Schedule):
        return f"objective.temperature: a schedule needs labels.kind dense or hidden; {kind} is exact at [{listed}] only"
    if temperature not in labels.temperatures:
        return f"objective.temperature {temperature} is not in labels.temperatures [{listed}]"
    if objective.taid is not None:
        return f"objective.taid: interpolates whole distributions, of which {kind} labels keep a part; use dense or hidden"
    return None


def _unsound_divergence(labels: Labels, objective: Objective) -> str | None:
    unsound = next((d.kind for d in objective.divergences if d.kind != "forward_kl"), None)
    if unsound is None:
        return None
    if isinstance(labels, SampledLabels):
        reason = "a draw is unbiased only where the teacher's probabilities enter linearly"
    elif isinstance(labels, TopkLabels) and labels.renormalize:
        reason = "no tail is kept"
    else:
        return None
    return f"objective.divergences: {unsound} cannot be had from {labels.kind} labels: {reason}; use topk, dense or hidden"


def _unkept(labels: Labels, objective: Objective) -> str | None:
    kept = kept_features(labels)
    for i, term in enumerate(objective.features):
        if not kept:
            return f"objective.features.{i}: {term.kind} needs the teacher's {term.part}, and labels.features keeps nothing"
        for _, layer in term.layers if not isinstance(term.layers, str) else ():
            if feature_name(term.part, layer) not in kept:
                return f"objective.features.{i}: needs {feature_name(term.part, layer)}, which labels.features does not keep"
    return None
