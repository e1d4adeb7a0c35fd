"""The teacher's labels, and how they are stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.base import NO_RESULT, Spec

Temperature = Annotated[float, Field(gt=0, le=1000)]


Part = Literal["hidden", "ffn", "queries", "keys", "values"]
"""Part of a decoder block: its output, its feed-forward output, or the vectors that its attention works on."""
ATTENTION_PARTS: tuple[Part, ...] = ("queries", "keys", "values")


class Feature(Spec):
    """Something inside the teacher, a vector per position."""

    layer: int = Field(ge=1)
    """Counted from 1."""
    part: Part = "hidden"

    @property
    def name(self) -> str:
        return feature_name(self.part, self.layer)


def feature_name(part: Part, layer: int) -> str:
    """Name of a feature wherever one is stored or passed on."""
    return f"{part}.{layer}"


class Vectors(Spec):
    """Storage format of vectors per position."""

    codec: Literal["fp16", "fp32", "int8", "pca"] = "fp16"
    """fp32 is exact; int8 keeps one fp32 scale per position; pca keeps fp16 coordinates in a basis that is fitted on the first
    shard."""
    rank: int | None = Field(default=None, ge=1)
    """Directions of the basis; for pca alone."""

    @model_validator(mode="after")
    def _rank_goes_with_pca(self) -> Vectors:
        if (self.codec == "pca") != (self.rank is not None):
            raise ValueError("codec pca needs a rank" if self.codec == "pca" else f"codec {self.codec} takes no rank")
        return self


class Features(Vectors):
    """Activations that are kept of the teacher's inner layers, for feature and relation losses."""

    keep: tuple[Feature, ...] = Field(min_length=1)

    @field_validator("keep")
    @classmethod
    def _once_each(cls, values: tuple[Feature, ...]) -> tuple[Feature, ...]:
        names = [feature.name for feature in values]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise ValueError(f"{doubled} is there twice")
        return values


class LabelsBase(Spec):
    features: Features | None = None
    run_ahead: Annotated[int | None, NO_RESULT] = Field(default=None, ge=1)
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


class HiddenLabels(LabelsBase, Vectors):
    """The teacher's last hidden state, to which the student's side applies the teacher's own head: exact at any temperature."""

    kind: Literal["hidden"]


Labels = Annotated[SampledLabels | TopkLabels | DenseLabels | HiddenLabels, Field(discriminator="kind")]


def kept_features(labels: Labels) -> tuple[str, ...]:
    """Names of the inner features that `labels` keep."""
    return tuple(feature.name for feature in labels.features.keep) if labels.features else ()


def principal_ranks(labels: Labels) -> dict[str, int]:
    """Ranks of the bases that `labels` need, by the name of what is projected."""
    ranks: dict[str, int] = {}
    if isinstance(labels, HiddenLabels) and labels.rank is not None:
        ranks["states"] = labels.rank
    if labels.features is not None and labels.features.rank is not None:
        ranks |= {name: labels.features.rank for name in kept_features(labels)}
    return ranks
