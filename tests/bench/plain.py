"""The plain training loop that the orchestrated one is measured against: bf16 weights, fp32 master weights, AdamW."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.losses.objective import Mixture
from orchestrator.models.build import DTYPES
from orchestrator.plan.schedule import learning_rate
from orchestrator.spec.train import Train
from orchestrator.student.engine import parameter_groups
from orchestrator.student.feed import MicroBatch


class PlainLoop:
    """A `Distiller` trained by hand, one process, no Ray, no DeepSpeed."""

    def __init__(self, distiller: Any, train: Train) -> None:
        self._train = train
        self._module = distiller.to(DTYPES[train.precision])
        self._weights = list(self._module.parameters())
        self._master = [p.detach().float().clone() for p in self._weights]
        by_weight = dict(zip(map(id, self._weights), self._master, strict=True))
        groups = parameter_groups(self._module, train.weight_decay)
        for group in groups:
            group["params"] = [by_weight[id(p)] for p in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas)

    def step(self, step: int, micro_batches: list[MicroBatch], mixture: Mixture) -> None:
        """One optimizer step."""
        gradients = [torch.zeros_like(m) for m in self._master]
        for micro in micro_batches:
            means = self._module(micro.ids, mixture, micro.soft, micro.features)
            (means[0] / len(micro_batches)).backward()
            for gradient, weight in zip(gradients, self._weights, strict=True):
                gradient += weight.grad.float()
                weight.grad = None
        for gradient, master in zip(gradients, self._master, strict=True):
            master.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._master, self._train.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._train, step)
        self._optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self._master, self._weights, strict=True):
                weight.copy_(master)
