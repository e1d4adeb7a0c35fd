"""The routers of a mixture of experts under training: kept in balance, and reported on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.models.router import RouterWatch, Routing, routers
from orchestrator.plan.batch import Batch
from orchestrator.student.job import TrainingJob


@dataclass(frozen=True)
class Experts:
    """The structure of a mixture of experts."""

    layers: int
    experts: int
    picks: int
    """Experts that a token is sent to."""
    ahead: bool
    """True if layers of multi-token-prediction modules are included."""

    @classmethod
    def of(cls, model: nn.Module) -> Experts | None:
        """None for a dense model."""
        found: list[Any] = list(routers(model).values())
        ahead = any(name.startswith("mtp.") for name in routers(model))
        return cls(len(found), found[0].num_experts, found[0].top_k, ahead) if found else None


class Balance:
    """All routers of a model in training; this rank trains `module`, in which are those of the MoE layers `mine`."""

    def __init__(self, job: TrainingJob, module: nn.Module, kind: Experts, mine: list[int]) -> None:
        self._kind, self._rows = kind, mine
        train = job.train
        scale = 1 / Batch.of(train).accumulation  # DeepSpeed divides the loss of a micro-batch by as much
        self._watch = RouterWatch(module, train.router_aux_weight, scale, kind.layers, f"{job.stage}.model")
        self._bias_rate = train.router_bias_rate
        self._ranks = train.data_parallel
        # A module that predicts further ahead meets one position less, the deeper the fewer.
        missing = job.ahead.depth * (job.ahead.depth + 1) // 2 if kind.ahead else 0
        self._tokens = train.global_batch * (job.manifest.seq_len * kind.layers - missing)

    def after_step(self, device: torch.device, applied: bool = True) -> torch.Tensor:
        """Move the routers' biases; (mean balance loss, greatest load over mean load, share of dropped picks), [3].

        Called on every rank after each optimizer step; over the global batch. A step that was not `applied` moves nothing.
        """
        kind, taken = self._kind, self._watch.take()
        aux, load = torch.zeros(kind.layers, device=device), torch.zeros(kind.layers, kind.experts, device=device)
        if self._rows:
            aux[self._rows], load[self._rows] = taken.aux.to(aux), taken.load.to(load)
        dist.all_reduce(aux)
        dist.all_reduce(load)
        if applied and self._rows and self._watch.biased and self._bias_rate:
            self._watch.update_bias(self._bias_rate, load[self._rows])
        busiest = Routing(aux, load).imbalance().max().float()
        return torch.stack([aux.mean() / self._ranks, busiest, 1 - load.sum() / (self._tokens * kind.picks)])
