"""The parallel strategies, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.losses.objective import Mixture
from orchestrator.models.mtp import MultiTokenPrediction
from orchestrator.student.balance import Balance
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import TrainingJob
from orchestrator.student.pipelined import Pipelined
from orchestrator.student.replicated import ExpertParallel, Replicated
from orchestrator.student.step import StepResult


class Trainer(Protocol):
    """A model under training on this rank."""

    model: PreTrainedModel
    """With parameters that may be sharded, or those of this rank's stage only."""
    mtp: MultiTokenPrediction | None
    balance: Balance | None
    """Load balancing of a mixture of experts; None for other models."""
    engine: Any
    """DeepSpeed's."""
    data_rank: int
    """Which of the `train.data_parallel` shares of a batch this rank works on."""
    reads_labels: bool
    """True if this rank computes the loss, and so reads labels."""

    def step(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> StepResult:
        """One optimizer step, which is left out on every rank if its gradient is not finite."""
        ...

    def measure(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Sums of (CE, divergence) over the targets of this rank's `micro_batches`, [2], without a trace on training.

        Called on every rank, with as many micro-batches of the same size. Their masks have a share of 1.
        """
        ...

    def tensors(self, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers of `module`, the model or a part of it, one after another: whole, on the CPU of rank 0.

        Called on every rank and gone through to the end; on the others nothing comes. Parameters are of `dtype`. Names are
        transformers', and a tied parameter comes once, under its first name.
        """
        ...


STRATEGIES: dict[str, Callable[[TrainingJob], Trainer]] = {"zero": Replicated, "pipeline": Pipelined, "expert": ExpertParallel}


def start_trainer(job: TrainingJob) -> Trainer:
    """The model of `job` as training begins, on this rank. Raises `SpecError` for one that cannot be trained so."""
    return STRATEGIES[job.train.parallel.kind](job)
