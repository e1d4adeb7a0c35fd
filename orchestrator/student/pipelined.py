"""Training with the blocks of the model spread over ranks: DeepSpeed's 1F1B pipeline, and DualPipeV."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from orchestrator.losses.objective import Mixture
from orchestrator.models.mtp import MultiTokenPrediction
from orchestrator.models.router import routers
from orchestrator.models.stages import Embedding, Pieces, pieces
from orchestrator.spec.train import Pipeline
from orchestrator.student.balance import Balance, Experts
from orchestrator.student.distiller import TERMS, head_loss, start_model
from orchestrator.student.engine import join_group, start_engine
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import TrainingJob
from orchestrator.student.ranks import gathered
from orchestrator.student.sharded import on_cpu, once
from orchestrator.student.step import StepResult

CUT_AT = "type:block|final"
"""Layers that DeepSpeed spreads evenly over the stages: blocks, and the norm with the head as one more of them."""


class Pipelined:
    """Micro-batches travel through the stages; ranks with the same stage train on rows of their own."""

    def __init__(self, job: TrainingJob) -> None:
        join_group()
        parallel = job.train.parallel
        assert isinstance(parallel, Pipeline)
        self.model = start_model(job, partial(_own_stages, parallel=parallel))
        cut = pieces(self.model)
        self._loss = _Loss(self.model)
        experts, whole = Experts.of(self.model), list(routers(self.model).values())
        module = _pipeline(cut, parallel, self._loss)
        _forget_buffers(self.model, module)
        self.engine = start_engine(module, job.train)
        mine = {id(router) for router in routers(module).values()}
        own = [layer for layer, router in enumerate(whole) if id(router) in mine]
        self.balance = Balance(job, module, experts, own) if experts else None
        self.mtp: MultiTokenPrediction | None = None
        self.data_rank: int = self.engine.grid.data_parallel_id
        self._data_ranks: int = self.engine.grid.data_parallel_size
        self.reads_labels: bool = self.engine.is_last_stage()

    def step(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> StepResult:
        self._loss.begin(mixture, micro_batches)
        self.engine.train_batch(iter([(micro.ids[:, :-1].long(), None) for micro in micro_batches]))
        terms = torch.stack(self._loss.terms or [torch.zeros(TERMS, device=self.engine.device)])
        mean = terms.mean(0) / self._data_ranks
        dist.all_reduce(mean)
        losses = terms[:, 0] if self.reads_labels else terms[:0, 0]
        return StepResult(mean, losses, self.engine.was_step_applied())

    def measure(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> torch.Tensor:
        raise AssertionError("a job that asks a pipeline for evaluations is refused")

    def tensors(self, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        everything = once(module.state_dict(keep_vars=True))
        holders = gathered([name for name, value in everything if not value.is_meta])
        for name, value in everything:
            holder = next(rank for rank, names in enumerate(holders) if name in names)
            if dist.get_rank() == holder == 0:
                yield name, on_cpu(value, dtype)
            elif dist.get_rank() == 0:
                kept = dtype if isinstance(value, nn.Parameter) else value.dtype
                whole = torch.empty_like(value, dtype=kept, device=self.engine.device)
                dist.recv(whole, src=holder)
                yield name, whole.cpu()
            elif dist.get_rank() == holder:
                kept = dtype if isinstance(value, nn.Parameter) else value.dtype
                dist.send(value.detach().to(kept).contiguous(), dst=0)


class _Loss:
    """The last layer of the pipeline. Micro-batches come in their order, which is how it knows their labels.

    It is a layer and not DeepSpeed's `loss_fn`: in bf16, DeepSpeed 0.19.8 clears gradients when the backward pass reaches what
    the last layer put out, and those of a head that is applied after that would be lost.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.terms: list[torch.Tensor] = []

    def begin(self, mixture: Mixture, micro_batches: list[MicroBatch]) -> None:
        self._mixture, self._coming, self.terms = mixture, iter(micro_batches), []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        micro = next(self._coming).on(hidden.device)
        means = head_loss(self._model, hidden, micro.ids, self._mixture, micro.soft, micro.mask)
        self.terms.append(torch.cat([means.detach(), means.new_zeros(TERMS - len(means))]))
        return means[0]


def _pipeline(cut: Pieces, parallel: Pipeline, loss: _Loss) -> nn.Module:
    from deepspeed.pipe import PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    layers: list[Any] = [cut.embedding, *cut.blocks, cut.final, loss]
    if cut.tied:
        shared = partial(TiedLayerSpec, "embedding", Embedding, cut.embedding.embed, tied_weight_attr="embed.weight")
        layers = [shared(), *cut.blocks, cut.final, shared(forward_fn=lambda _embedding, hidden: loss(hidden))]
    kind = {"1f1b": PipelineModule, "dualpipev": DualPipeVModule}[parallel.schedule]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
        return kind(layers=layers, num_stages=parallel.stages, partition_method=CUT_AT)


def _own_stages(model: PreTrainedModel, parallel: Pipeline) -> set[str]:
    """Names of the parameters in the stages of this rank.

    Told before DeepSpeed cuts, by what it cuts with; were it to cut elsewhere, it would fail to move what is not there.
    """
    from deepspeed.runtime.utils import partition_balanced

    cut = pieces(model)
    head = [cut.embedding] if cut.tied else []
    layers = [[cut.embedding], *([block] for block in cut.blocks), [cut.final], head]
    bounds = partition_balanced([0, *(1 for _ in cut.blocks), 1, 0], parallel.parts)
    stage = dist.get_rank() * parallel.stages // dist.get_world_size()
    stages = [stage] if parallel.schedule == "1f1b" else [stage, parallel.parts - 1 - stage]
    own = {id(p) for s in stages for layer in layers[bounds[s] : bounds[s + 1]] for part in layer for p in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _forget_buffers(model: PreTrainedModel, mine: nn.Module) -> None:
    """Free the buffers of `model` that belong to the stages of other ranks."""
    kept = {id(buffer) for buffer in mine.buffers()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in kept:
                module._buffers[name] = buffer.to("meta")
