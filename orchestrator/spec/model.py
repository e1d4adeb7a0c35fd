"""The sections `teacher` and `student` of a job."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from orchestrator.spec.base import NO_RESULT, Spec
from orchestrator.spec.train import Train


class Model(Spec):
    """A decoder built from scratch: a transformers model type and its configuration values.

    `vocab_size` follows from the tokenizer and may be left out; where given it must agree. Special ids are the tokenizer's.
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
    micro_batch: Annotated[int, NO_RESULT] = Field(default=8, ge=1)
    """Rows in one forward pass of a teacher actor."""
    shards: Annotated[int, NO_RESULT] = Field(default=1, ge=1)
    """Processes that hold one replica together (tensor parallel); each reads only its part of the weights."""
    replicas: Annotated[Replicas, NO_RESULT] = Replicas()
    cpus_per_shard: Annotated[float, NO_RESULT] = Field(default=1, gt=0)
    gpus_per_shard: Annotated[float, NO_RESULT] = Field(default=0, ge=0, le=1)
    placement_timeout_s: Annotated[float, NO_RESULT] = Field(default=600, gt=0)
    """Seconds that `replicas.min` replicas may wait for room on the cluster before the run gives up."""

    @property
    def cpus_per_replica(self) -> float:
        return self.shards * self.cpus_per_shard

    @property
    def gpus_per_replica(self) -> float:
        return self.shards * self.gpus_per_shard

    @model_validator(mode="after")
    def _a_whole_gpu_each(self) -> Self:
        if self.shards > 1 and self.gpus_per_shard % 1:
            raise ValueError(f"gpus_per_shard {self.gpus_per_shard:g}: shards exchange through GPUs of their own, whole ones")
        return self


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


class VllmServer(Spec):
    """A server of vLLM that serves the teacher for `data.seq_len` + 2 tokens; its key is taken from VLLM_API_KEY."""

    url: Annotated[str, NO_RESULT] = Field(pattern=r"^https?://[^/@]+/?$")
    """The server's address, as in http://host:8000."""
    model: str | None = None
    """Name under which it is served; null: the server's first model, whose name is looked up when a run starts."""


class TransformersTeacher(TeacherBase):
    """A Hugging Face causal LM: a local folder or a hub name."""

    kind: Literal["transformers"]
    path: str
    revision: str | None = None
    vllm: VllmServer | None = None
    """Serves the same model and answers in its stead; tokenizer and identity are those of `path`, and `shards` and
    `gpus_per_shard` are then without effect."""


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


def vllm_of(teacher: TeacherBase) -> VllmServer | None:
    """The server that labels in place of `teacher`, if there is one."""
    return teacher.vllm if isinstance(teacher, TransformersTeacher) else None


def labelled_by(teacher: TeacherBase) -> TeacherBase:
    """`teacher` as its labelling replicas are: where a server answers, they are one process without a GPU."""
    return teacher.model_copy(update={"shards": 1, "gpus_per_shard": 0}) if vllm_of(teacher) else teacher


Teacher = Annotated[PretrainTeacher | TransformersTeacher | GgufTeacher, Field(discriminator="kind")]


class StudentBase(Spec):
    mtp_depth: int = Field(default=0, ge=0, le=4)
    """Multi-token-prediction modules (DeepSeek-V3), each predicting one token further ahead."""
    mtp_weight: float = Field(default=0.3, gt=0)
    """Weight of the mean of the losses of these modules."""


class ConfigStudent(StudentBase):
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


class CheckpointStudent(StudentBase):
    """A student that has been trained before: a local folder or a hub name."""

    kind: Literal["checkpoint"]
    path: str
    revision: str | None = None
    vocab_alignment: Literal["exact", "truncate_padding"] = "exact"
    """For a vocabulary of another size than the teacher's. truncate_padding: ids that the tokenizer never gives are dropped,
    or empty ones added, until it has that size."""


class PrunedStudent(StudentBase):
    """The most important parts of the teacher, by its activations (Minitron). Sizes that are left out are kept."""

    kind: Literal["pruned"]
    layers: int | None = Field(default=None, ge=1)
    hidden_size: int | None = Field(default=None, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)
    """Channels of every feed-forward network."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads, each with its query heads."""
    calibration_rows: int = Field(default=64, ge=1)
    """Training windows on which importance is measured."""

    @model_validator(mode="after")
    def _something(self) -> PrunedStudent:
        if {self.layers, self.hidden_size, self.intermediate_size, self.kv_heads} == {None}:
            raise ValueError("nothing is pruned: give layers, hidden_size, intermediate_size or kv_heads")
        return self


class UpcycledStudent(StudentBase):
    """A mixture of experts made from a dense checkpoint: each expert a copy of its feed-forward network, the router new."""

    kind: Literal["upcycled"]
    path: str
    revision: str | None = None
    experts: int = Field(default=8, ge=2)
    experts_per_token: int = Field(default=2, ge=1)
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of what is added to the copies' weights, relative to theirs; 0 leaves the function unchanged."""

    @model_validator(mode="after")
    def _few_of_many(self) -> UpcycledStudent:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is above experts {self.experts}")
        return self


Student = Annotated[ConfigStudent | CheckpointStudent | PrunedStudent | UpcycledStudent, Field(discriminator="kind")]
