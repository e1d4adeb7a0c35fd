"""Description of a training job, whoever is trained: a teacher from scratch, the student, or the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.order import TrainingOrder
from orchestrator.spec.labels import Labels
from orchestrator.spec.model import Model
from orchestrator.spec.objective import Objective
from orchestrator.spec.train import Train
from orchestrator.store.files import Store
from orchestrator.store.heldout import HeldoutLog
from orchestrator.store.records import Record, TokenManifest

CHECKPOINT_PREFIX = "step-"
TRAINING_VERSION = 5
"""Raised when the code makes other weights of the same job."""


@dataclass(frozen=True)
class Soft:
    """The source of the soft labels, and how they enter the loss."""

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
        model = self.model.content if isinstance(self.model, Initial) else self.model
        what = [model, self.vocab_size, [self.ahead.depth, self.ahead.weight]]
        evaluation = [self.evaluation.every, self.evaluation.rows] if self.evaluation and self.selects else None
        return fingerprint("train", TRAINING_VERSION, what, self.train, self.seed, self.manifest.content, soft, evaluation)

    @property
    def selects(self) -> bool:
        """Return whether evaluations decide when training ends, or which weights it keeps."""
        return self.train.keep == "best" or self.train.patience is not None

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
        """Return the objective that is minimised; without soft labels, cross entropy alone."""
        return self.soft.objective if self.soft else Objective(alpha=1.0)

    @property
    def order(self) -> TrainingOrder:
        manifest = self.manifest
        return TrainingOrder(manifest.train.rows, manifest.group_rows, self.seed, self.train.global_batch, self.steps)

    def demanded_shards(self) -> list[int]:
        """Token shards that training will touch, in the order of first use."""
        return self.order.shards_until(self.steps)


def checkpoint_steps(store: Store, checkpoints: str) -> list[int]:
    """Steps of the published checkpoints in the folder `checkpoints`, intact or not, ascending."""
    names = [name for name in store.keys(checkpoints) if name.startswith(CHECKPOINT_PREFIX)]
    return sorted(int(name.removeprefix(CHECKPOINT_PREFIX)) for name in names)
