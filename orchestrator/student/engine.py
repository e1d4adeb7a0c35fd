"""The one place that calls `deepspeed.initialize`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.labels.targets import Targets
from orchestrator.losses.head import chunked_loss
from orchestrator.losses.inner import InnerLoss, links
from orchestrator.losses.objective import Mixture
from orchestrator.models.build import build_model, outline
from orchestrator.models.features import captured, feature_widths, layer_count
from orchestrator.models.head import check_head, last_hidden, output_head
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.spec.labels import kept_features
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import Soft, TrainingJob


class Distiller(nn.Module):
    """A causal LM with its objective: token ids and soft labels in, loss out."""

    def __init__(self, model: PreTrainedModel, inner: InnerLoss | None) -> None:
        super().__init__()
        self.model = model
        self.inner = inner

    def forward(
        self, ids: torch.Tensor, mixture: Mixture, soft: Targets | None, features: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Means over all positions of (loss, CE, divergence, features' loss), [4]; only the first has a gradient.

        `ids` are [rows, seq + 1], `soft` and the teacher's `features` have tensors [rows, seq, ...].
        """
        names = () if self.inner is None else self.inner.student_features
        with captured(self.model, names, "objective.features") as own:
            hidden = last_hidden(self.model, ids[:, :-1]).flatten(0, 1)
        target = ids[:, 1:].flatten()
        teacher = None if soft is None else soft.map(lambda t: t.flatten(0, 1))

        def score(logits: torch.Tensor, part: slice) -> torch.Tensor:
            return mixture.score(logits, target[part], None if teacher is None else teacher.map(lambda t: t[part]))

        loss, ce, divergence = chunked_loss(hidden, output_head(self.model), score) / len(target)
        if self.inner is None:
            return torch.stack([loss, ce, divergence, torch.zeros_like(ce)])
        inner = self.inner(features, own)
        return torch.stack([loss + inner, ce, divergence, inner.detach()])


def build_distiller(job: TrainingJob) -> Distiller:
    """The model of `job`, freshly initialised, with what its objective learns beside it.

    Raises `SpecError` for a model whose head the chunked loss cannot stand for, and for features that are not there.
    """
    model = build_model(job.model, job.vocab_size, job.seed, job.stage)
    check_head(model, f"{job.stage}.model")
    return Distiller(model, _inner_loss(job.soft, model, job.seed) if job.soft and job.soft.objective.features else None)


def _inner_loss(soft: Soft, model: PreTrainedModel, seed: int) -> InnerLoss:
    teacher = outline(soft.teacher)
    linked = links(soft.objective.features, layer_count(model), layer_count(teacher))
    missing = [link.teacher for link in linked if link.teacher not in kept_features(soft.labels)]
    if missing:
        raise SpecError(f"objective.features: needs {missing[0]}, which labels.features does not keep")
    ours = feature_widths(model, {link.student for link in linked}, "objective.features")
    theirs = feature_widths(teacher, {link.teacher for link in linked}, "objective.features")
    return InnerLoss(linked, ours, theirs, seed)


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
    """One micro-batch through the engine: mean (loss, CE, divergence, features' loss), [4], detached."""
    on = engine.device
    soft = None if micro.soft is None else micro.soft.map(lambda t: t.to(on))
    means = engine(micro.ids.to(on), mixture, soft, {name: states.to(on) for name, states in micro.features.items()})
    engine.backward(means[0])
    return means.detach()
