"""The one place that calls `deepspeed.initialize`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from orchestrator.losses.objective import Mixture
from orchestrator.models.build import build_model
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import TrainingJob


class Distiller(nn.Module):
    """A causal LM with its objective: token ids and soft labels in, loss out."""

    def __init__(self, model: nn.Module, mixture: Mixture) -> None:
        super().__init__()
        self.model = model
        self._mixture = mixture

    def forward(
        self,
        ids: torch.Tensor,
        soft_ids: torch.Tensor | None = None,
        soft_probs: torch.Tensor | None = None,
        soft_tail: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean (loss, CE, KL) in nats a token; shapes as in `MicroBatch`."""
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        target = ids[:, 1:].flatten()
        soft = None
        if soft_ids is not None and soft_probs is not None:
            soft = (soft_ids.flatten(0, 1), soft_probs.flatten(0, 1), None if soft_tail is None else soft_tail.flatten())
        loss, ce, kd = self._mixture(logits, target, soft)
        return loss / len(target), ce / len(target), kd / len(target)


def build_distiller(job: TrainingJob) -> Distiller:
    """The model of `job`, freshly initialised, with its objective."""
    objective = job.soft.objective if job.soft else None
    mixture = Mixture(
        alpha=objective.alpha if objective else 1.0,
        temperature=objective.temperature if objective else 1.0,
        temperature_squared=objective.temperature_squared if objective else True,
    )
    return Distiller(build_model(job.model, job.vocab_size, job.seed, job.stage), mixture)


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


def forward_backward(engine: Any, micro: MicroBatch) -> torch.Tensor:
    """One micro-batch through the engine: mean (loss, CE, KL) in nats a token, [3], detached."""
    on = engine.device
    soft = () if micro.soft is None else tuple(None if t is None else t.to(on) for t in micro.soft)
    loss, ce, kd = engine(micro.ids.to(on), *soft)
    engine.backward(loss)
    return torch.stack([loss.detach(), ce, kd])
