"""Training with a whole model on every rank, or a share of it that ZeRO brings together when it is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.losses.objective import Mixture
from orchestrator.models.share import Share
from orchestrator.spec.train import Expert
from orchestrator.student.balance import Balance, Experts
from orchestrator.student.distiller import Distiller, build_distiller
from orchestrator.student.engine import join_group, start_engine
from orchestrator.student.experts import check_experts, experts_in_sight, whole_expert_state
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import TrainingJob
from orchestrator.student.sharded import even_share, partition


class Replicated:
    """Data parallel: every rank trains on rows of its own."""

    reads_labels = True

    def __init__(self, job: TrainingJob) -> None:
        join_group()
        distiller = build_distiller(job, self._share(job))
        self.model, self.mtp = distiller.model, distiller.mtp
        experts = Experts.of(distiller)
        self.engine = self._start(distiller, job)
        self.balance = Balance(job, distiller, experts, list(range(experts.layers))) if experts else None
        self.data_rank = dist.get_rank()
        self._zero_stage = job.train.parallel.stage

    def _share(self, job: TrainingJob) -> Share | None:
        """What this rank makes of the model; None for all of it."""
        return even_share if job.train.parallel.stage == 3 else None

    def _start(self, distiller: Distiller, job: TrainingJob) -> Any:
        if job.train.parallel.stage == 3:
            partition(distiller, job.train)
        return start_engine(distiller, job.train)

    def step(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> torch.Tensor:
        terms: list[torch.Tensor] = []
        for micro in micro_batches:
            terms.append(self._forward_backward(mixture, micro))
            self.engine.step()
        mean = torch.stack(terms).mean(0) / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    @torch.no_grad()
    def measure(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> torch.Tensor:
        self.engine.eval()
        sums = torch.stack([self._forward(mixture, micro)[1:3] * micro.ids[:, 1:].numel() for micro in micro_batches]).sum(0)
        self.engine.train()
        return sums

    def _forward_backward(self, mixture: Mixture, micro: MicroBatch) -> torch.Tensor:
        means = self._forward(mixture, micro)
        self.engine.backward(means[0])
        return means.detach()

    def _forward(self, mixture: Mixture, micro: MicroBatch) -> torch.Tensor:
        micro = micro.on(self.engine.device)
        return self.engine(micro.ids, mixture, micro.soft, micro.features, micro.mask)

    def whole_state(self, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        first = dist.get_rank() == 0
        state = {
            name: value.detach().to("cpu", dtype if isinstance(value, nn.Parameter) else None)
            for name, value in (module.state_dict(keep_vars=True).items() if first else ())
        }
        if self._zero_stage < 3:
            return state
        import deepspeed

        for name, parameter in module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if first:
                    state[name] = parameter.detach().to("cpu", dtype).clone()
        return state


class ExpertParallel(Replicated):
    """Data parallel, with the experts of every block spread over groups of ranks (DeepSpeed AutoEP)."""

    def _share(self, job: TrainingJob) -> Share | None:
        return None  # AutoEP takes its part of the experts out of whole blocks

    def _start(self, distiller: Distiller, job: TrainingJob) -> Any:
        parallel = job.train.parallel
        assert isinstance(parallel, Expert)
        check_experts(distiller.model, parallel.size, "teacher.train" if job.stage == "teacher" else "train")
        with experts_in_sight(distiller, distiller.model):
            return start_engine(distiller, job.train)

    def whole_state(self, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return whole_expert_state(module, dtype)
