"""What a training job is, whoever is trained: a teacher from scratch, the student, or the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.plan.batch import Batch
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.order import TrainingOrder
from orchestrator.spec.labels import Labels
from orchestrator.spec.model import Model
from orchestrator.spec.objective import Objective
from orchestrator.spec.train import Train
from orchestrator.store.heldout import HeldoutLog
from orchestrator.store.records import Record, TokenManifest

NO_RESULT = {"checkpoint_every", "max_restarts", "workers", "cpus_per_worker", "activation_checkpointing"}
"""Fields of `train` that change no weight but by rounding: more workers add up the same gradients in another order. A training
must find its checkpoints again when one of them changes."""
SELECTION = {"keep", "patience"}
"""Fields of `train` that change no weight but by evaluations (`TrainingJob.selection`)."""
TRAINING_VERSION = 3
"""Raised when the code makes other weights of the same job."""


@dataclass(frozen=True)
class Soft:
    """Where the soft labels come from and how they enter the loss."""

    log_key: str
    labels: Labels
    objective: Objective
    teacher: str
    """Address of the teacher's folder, for labels that leave its head to the reader."""
    teacher_dtype: Literal["bf16", "fp32"]


class Initial(Record):
    """Weights that training starts from: the address of a Hugging Face folder that every node can open."""

    folder: str
    content: str
    """Hex identity of what is in it."""


@dataclass(frozen=True)
class Ahead:
    """Multi-token prediction beside the model."""

    depth: int = 0
    weight: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on a few held-out rows while training goes on."""

    every: int
    """Steps."""
    rows: int
    log: HeldoutLog | None
    """Without a teacher's labels, cross entropy alone."""


@dataclass(frozen=True)
class TrainingJob:
    """Train `model` on the rows of `manifest`; without `soft`, on hard labels alone."""

    stage: str
    model: Model | Initial
    """A model to be freshly initialised from `seed`, or one that has weights already."""
    vocab_size: int
    train: Train
    seed: int
    data_folder: str
    manifest: TokenManifest
    soft: Soft | None
    ahead: Ahead = Ahead()
    evaluation: Evaluation | None = None

    @property
    def key(self) -> str:
        """Name of the result: everything that can change a weight is in it."""
        soft = None
        if self.soft is not None:
            soft = [self.soft.log_key, self.soft.objective]
        train = self.train.model_dump(mode="json", exclude=NO_RESULT | SELECTION | {"epochs"})
        train["micro_batch"] = Batch.of(self.train).micro_rows
        model = self.model.content if isinstance(self.model, Initial) else self.model
        what = [model, self.vocab_size, [self.ahead.depth, self.ahead.weight]]
        selected = [] if self.selection is None else [self.selection]
        return fingerprint("train", TRAINING_VERSION, what, train, self.seed, self.manifest.content, soft, *selected)

    @property
    def selection(self) -> dict[str, Any] | None:
        """What decides, by held-out cross entropy, where training ends and which weights it leaves; None if nothing does."""
        train, evaluation = self.train, self.evaluation
        if evaluation is None or (train.keep == "last" and train.patience is None):
            return None
        return {"keep": train.keep, "patience": train.patience, "every": evaluation.every, "rows": evaluation.rows}

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        assert self.train.steps is not None
        return self.train.steps

    @property
    def folder(self) -> str:
        """Stage folder in the storage."""
        return f"{self.stage}/{self.key}"

    @property
    def objective(self) -> Objective:
        """What is minimised; without soft labels, cross entropy alone."""
        return self.soft.objective if self.soft else Objective(alpha=1.0)

    @property
    def order(self) -> TrainingOrder:
        return TrainingOrder(self.manifest.shard_rows, self.seed, self.train.global_batch)

    def demanded_shards(self) -> list[int]:
        """Token shards that training will touch, in the order of first use."""
        return self.order.shards_until(self.steps)
