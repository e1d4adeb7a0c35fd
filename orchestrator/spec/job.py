"""The root of a job file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.base import NO_RESULT, Spec
from orchestrator.spec.data import Data, TeacherTokenizer
from orchestrator.spec.labels import ATTENTION_PARTS, Labels, SampledLabels, TopkLabels
from orchestrator.spec.model import ConfigStudent, PretrainTeacher, Student, Teacher, vllm_of
from orchestrator.spec.objective import Objective, unserved
from orchestrator.spec.train import Pipeline, Train

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class Evaluate(Spec):
    rows: int = Field(default=128, ge=1)
    """Held-out windows to measure on, at most."""
    baseline: bool = True
    """Also train the same student on hard labels alone; without it "distillation worked" is no statement."""
    micro_batch: Annotated[int, NO_RESULT] = Field(default=8, ge=1)
    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations of a model while it trains, and one after the last; null: none. Held-out cross entropy, and KL
    from the teacher, of the student, the baseline and a teacher that is trained here."""
    every_rows: int = Field(default=16, ge=1)
    """Held-out windows of these evaluations, the same each time; others than those of `rows`, where there are enough."""

    @property
    def watched(self) -> int:
        """Held-out windows that training is evaluated on."""
        return self.every_rows if self.every else 0


class Export(Spec):
    directory: Annotated[str | None, NO_RESULT] = None
    """Destination of the Hugging Face folder; null: `export` in the run directory."""
    mtp: Literal["keep", "drop"] = "keep"
    """Multi-token-prediction modules, in files of their own beside the model."""


class Tracking(Spec):
    enabled: bool = True
    uri: str | None = None
    """MLflow tracking URI; null: $MLFLOW_TRACKING_URI, else an SQLite file in the storage, if that is a directory."""
    experiment: str = Field(default="distill", min_length=1, max_length=250)


class Cluster(Spec):
    address: str = "local"
    """`local` starts Ray on this machine; `auto` or `host:port` joins a running cluster."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPU slots of a local Ray; null: the machine's cores, or what the job needs if that is more."""
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray, which also lists it for Prometheus."""


class Job(Spec):
    name: Annotated[str, Field(pattern=NAME_PATTERN), NO_RESULT]
    """Name of the run; a job that is changed under the same name becomes another run, NAME-2."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Student initialisation and training order."""
    storage: Annotated[str, NO_RESULT] = Field(default="./distill-store", min_length=1)
    """A directory that all nodes share, or `s3://bucket/prefix` with what the AWS_* environment variables say."""
    data: Data = Data()
    teacher: Teacher = PretrainTeacher()
    labels: Labels = SampledLabels()
    student: Student = ConfigStudent()
    objective: Objective = Objective()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    tracking: Annotated[Tracking, NO_RESULT] = Tracking()
    cluster: Annotated[Cluster, NO_RESULT] = Cluster()

    @property
    def trainings(self) -> dict[str, Train]:
        """Return the trainings by the key of their section; the baseline is trained like the student."""
        found = {"train": self.train}
        return found | {"teacher.train": self.teacher.train} if isinstance(self.teacher, PretrainTeacher) else found

    @field_validator("storage")
    @classmethod
    def _known_storage(cls, storage: str) -> str:
        if "://" in storage and not re.match(r"s3://[^/]", storage):
            raise ValueError(f"{storage} is neither a directory nor s3://bucket/prefix")
        return storage

    @model_validator(mode="after")
    def _labels_serve_objective(self) -> Job:
        reason = unserved(self.labels, self.objective)
        if reason is not None:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _strategy_serves_student(self) -> Job:
        if isinstance(self.train.parallel, Pipeline):
            for asked, what in (
                (self.student.mtp_depth > 0, "student.mtp_depth needs the embedding where the loss is"),
                (bool(self.objective.features), "objective.features needs every layer where the loss is"),
            ):
                if asked:
                    raise ValueError(f"{what}; train.parallel.kind pipeline spreads them: use zero (stage 3 for large models)")
        return self

    @model_validator(mode="after")
    def _evaluation_serves_training(self) -> Job:
        for section, train in self.trainings.items():
            chosen = "keep: best" if train.keep == "best" else f"patience: {train.patience}" if train.patience else None
            if chosen and self.evaluate.every is None:
                raise ValueError(f"{section}.{chosen} goes by evaluations during training: give evaluate.every")
            if self.evaluate.every is not None and isinstance(train.parallel, Pipeline):
                raise ValueError(
                    f"evaluate.every: {section}.parallel.kind pipeline has no pass but a training step; use zero (stage 3 for "
                    "large models)"
                )
        return self

    @model_validator(mode="after")
    def _shards_serve_labels(self) -> Job:
        kept = self.labels.features.keep if self.labels.features else ()
        split = next((feature.name for feature in kept if feature.part in ATTENTION_PARTS), None)
        if self.teacher.shards > 1 and split:
            raise ValueError(f"labels.features.keep: {split} is spread over teacher.shards; hidden and ffn can be kept")
        return self

    @model_validator(mode="after")
    def _a_server_tells_the_top(self) -> Job:
        told = isinstance(self.labels, TopkLabels) and self.labels.temperatures == (1.0,) and self.labels.features is None
        if vllm_of(self.teacher) and not told:
            raise ValueError("labels: teacher.vllm tells top ids alone: kind topk, temperatures [1.0], no features")
        return self

    @model_validator(mode="after")
    def _fp8_takes_the_batch(self) -> Job:
        train, rows = self.train, self.train.global_batch // self.train.data_parallel
        least = 128 if train.fp8_recipe == "blockwise" else 16
        tokens = min(train.micro_batch, rows) * self.data.seq_len
        if train.precision == "fp8" and tokens % least:
            raise ValueError(
                f"train.precision fp8: {tokens} tokens in a micro-batch (rows x seq_len) are no multiple of {least}"
            )
        return self

    @model_validator(mode="after")
    def _tokenizer_fits_teacher(self) -> Job:
        own = isinstance(self.data.tokenizer, TeacherTokenizer)
        if isinstance(self.teacher, PretrainTeacher) == own:
            want = "train" if own else "teacher"
            raise ValueError(f"data.tokenizer.kind must be '{want}' when teacher.kind is '{self.teacher.kind}'")
        return self
