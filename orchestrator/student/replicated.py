"""Training with a whole model on every rank, or a share of it that ZeRO brings together when it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.losses.objective import Mixture
from orchestrator.spec.train import Expert
from orchestrator.student._compat import step_left_out
from orchestrator.student.balance import Balance, Experts
from orchestrator.student.distiller import Distiller, build_distiller
from orchestrator.student.engine import join_group, start_engine
from orchestrator.student.experts import check_experts, expert_tensors, experts_in_sight
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import TrainingJob
from orchestrator.student.sharded import complete, even_share, on_cpu, once, partition
from orchestrator.student.step import StepResult


class Replicated:
    """Data parallel: every rank trains on rows of its own."""

    reads_labels = True

    def __init__(self, job: TrainingJob) -> None:
        join_group()
        distiller = build_distiller(job, even_share)
        self.model, self.mtp = distiller.model, distiller.mtp
        experts = Experts.of(distiller)
        self.engine = self._start(distiller, job)
        self.balance = Balance(job, distiller, experts, list(range(experts.layers))) if experts else None
        self.data_rank = dist.get_rank()
        self._zero_stage = job.train.parallel.stage

    def _start(self, distiller: Distiller, job: TrainingJob) -> Any:
        if job.train.parallel.stage == 3:
            partition(distiller, job.train)
        else:
            complete(distiller.model, job.train)
        return start_engine(distiller, job.train)

    def step(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> StepResult:
        parts: list[torch.Tensor] = []
        applied = True
        for micro in micro_batches:
            parts.append(self._forward_backward(mixture, micro))
            applied = self._zero_stage > 0 or not self.engine.is_gradient_accumulation_boundary() or self._finite_gradient()
            with nullcontext() if applied else step_left_out(self.engine.optimizer):
                self.engine.step()
        terms = torch.stack(parts)
        mean = terms.mean(0) / dist.get_world_size()
        dist.all_reduce(mean)
        return StepResult(mean, terms[:, 0], applied and self.engine.was_step_applied())

    def _finite_gradient(self) -> bool:
        """Return whether the gradient of the whole batch is finite. The stages of ZeRO check this themselves; without ZeRO,
        every rank has the whole gradient, so all decide alike."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

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

    def tensors(self, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed import zero

        for name, value in once(module.state_dict(keep_vars=True)):
            with zero.GatheredParameters([value]):  # which leaves alone what is whole already
                whole = on_cpu(value, dtype) if dist.get_rank() == 0 else None
            if whole is not None:
                yield name, whole


class ExpertParallel(Replicated):
    """Data parallel, with the experts of every block spread over groups of ranks (DeepSpeed AutoEP)."""

    def _start(self, distiller: Distiller, job: TrainingJob) -> Any:
        parallel = job.train.parallel
        assert isinstance(parallel, Expert)
        complete(distiller.model, job.train)  # AutoEP takes its part of the experts out of whole blocks
        check_experts(distiller.model, parallel.size, "teacher.train" if job.stage == "teacher" else "train")
        with experts_in_sight(distiller, distiller.model):
            return start_engine(distiller, job.train)

    def tensors(self, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        return expert_tensors(module, dtype)
