"""The one place that calls `deepspeed.initialize`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.labels.targets import Targets
from orchestrator.losses.head import chunked_loss
from orchestrator.losses.objective import Mixture
from orchestrator.models.build import build_model
from orchestrator.models.head import check_head, last_hidden, output_head
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import TrainingJob


class Distiller(nn.Module):
    """A causal LM with its objective: token ids and soft labels in, loss out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mixture: Mixture, soft: Targets | None) -> torch.Tensor:
        """Means over all positions of (loss, CE, divergence) in nats, [3]; only the loss has a gradient.

        `ids` are [rows, seq + 1], `soft` has tensors [rows, seq, ...].
        """
        hidden = last_hidden(self.model, ids[:, :-1]).flatten(0, 1)
        target = ids[:, 1:].flatten()
        teacher = None if soft is None else soft.map(lambda t: t.flatten(0, 1))

        def score(logits: torch.Tensor, part: slice) -> torch.Tensor:
            return mixture.score(logits, target[part], None if teacher is None else teacher.map(lambda t: t[part]))

        return chunked_loss(hidden, output_head(self.model), score) / len(target)


def build_distiller(job: TrainingJob) -> Distiller:
    """The model of `job`, freshly initialised; raises `SpecError` for one whose head the chunked loss cannot stand for."""
    model = build_model(job.model, job.vocab_size, job.seed, job.stage)
    check_head(model, f"{job.stage}.model")
    return Distiller(model)


def start_engine(job: TrainingJob) -> Any:
    """A DeepSpeed engine around a fresh `Distiller`, on this process's rank."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would compile its shared-memory collectives at start, for minutes; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    distiller = build_distiller(job)
    initialize: Any = deepspeed.initialize
    engine, *_ = initialize(
        model=distiller,
        model_parameters=parameter_groups(distiller, job.train.weight_decay),
        config=deepspeed_config(job.train),
    )
    return engine


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; norms and biases go without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def forward_backward(engine: Any, mixture: Mixture, micro: MicroBatch) -> torch.Tensor:
    """One micro-batch through the engine: mean (loss, CE, divergence) in nats a token, [3], detached."""
    on = engine.device
    soft = None if micro.soft is None else micro.soft.map(lambda t: t.to(on))
    means = engine(micro.ids.to(on), mixture, soft)
    engine.backward(means[0])
    return means.detach()
