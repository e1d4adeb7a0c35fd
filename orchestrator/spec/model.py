"""Who teaches and who learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from orchestrator.spec.base import Spec
from orchestrator.spec.train import Train


class Model(Spec):
    """A decoder built from scratch: a transformers model type and its configuration values.

    `vocab_size` follows from the tokenizer and may be left out; where given it must agree.
    """

    type: str = "llama"
    config: dict[str, JsonValue] = Field(default={})


class Replicas(Spec):
    """Size of the teacher actor pool."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class TeacherBase(Spec):
    dtype: Literal["bf16", "fp32"] = "bf16"
    micro_batch: int = Field(default=8, ge=1)
    """Rows in one forward pass of a teacher actor."""
    replicas: Replicas = Replicas()
    cpus_per_replica: float = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=0, ge=0)


class PretrainTeacher(TeacherBase):
    """Train the teacher here, from scratch, on the same tokens, by cross entropy."""

    kind: Literal["pretrain"] = "pretrain"
    model: Model = Model(
        config={
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        }
    )
    train: Train = Train(steps=300)
    seed: int = Field(default=0, ge=0, lt=2**63)


class TransformersTeacher(TeacherBase):
    """A Hugging Face causal LM: a local folder or a hub name."""

    kind: Literal["transformers"]
    path: str
    revision: str | None = None


class GgufTeacher(TeacherBase):
    """A causal LM in one GGUF file, or in an installed Python package that assembles one."""

    kind: Literal["gguf"]
    file: str | None = None
    package: str | None = None
    """Import name of a package with `assemble(path)`."""

    @model_validator(mode="after")
    def _one_origin(self) -> GgufTeacher:
        if (self.file is None) == (self.package is None):
            raise ValueError("give either file or package")
        return self


Teacher = Annotated[PretrainTeacher | TransformersTeacher | GgufTeacher, Field(discriminator="kind")]


class ConfigStudent(Spec):
    """A student built from scratch from a configuration."""

    kind: Literal["config"] = "config"
    model: Model = Model(
        config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        }
    )


Student = ConfigStudent
