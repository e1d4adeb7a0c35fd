"""Training support for mixtures of experts, beside the loss: routers that stay balanced, and figures of how balanced they are.

All of it hangs on forward hooks of the routers, so that it works block by block: on one stage of a pipeline, under activation
checkpointing, with the experts of a layer spread over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orchestrator.errors import SpecError

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.float().softmax(-1),
    "sigmoid": lambda logits: logits.float().sigmoid(),
}
"""By name: what a router makes of its logits [tokens, experts] before it picks the largest."""

Hook = Callable[[nn.Module, Any, Any], Any]


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routing modules of `model` by name, in the order of its layers; none in a dense model."""
    return {
        name: module
        for name, module in model.named_modules()
        if "Router" in type(module).__name__ and hasattr(module, "num_experts") and hasattr(module, "top_k")
    }


def active_parameters(model: nn.Module) -> int:
    """Parameters of `model` that one token meets: of the experts of a layer, as many as its router picks."""
    idle = 0.0
    found: dict[str, Any] = routers(model)  # pyright: ignore[reportAssignmentType]
    for name, router in found.items():
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts * (1 - router.top_k / router.num_experts)
    return round(sum(p.numel() for p in model.parameters()) - idle)


def balance_loss(scores: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """E/k · Σ_i f_i P_i of one layer and micro-batch: 1 when balanced, E/k at worst; differentiable through P.

    f_i is the part of the tokens that picked expert i, P_i the mean over tokens of `scores` [tokens, experts] after these are
    scaled to sum 1; `picked` [tokens, k] holds expert ids. For softmax and k = 1 this is Switch Transformer's loss (arXiv
    2101.03961, eq. 4-6), for sigmoid scores that of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20) over a micro-batch instead of
    a sequence.
    """
    tokens, experts = scores.shape
    parts = _counts(picked, experts) / tokens
    means = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return experts / picked.shape[1] * (parts * means).sum()


@dataclass(frozen=True)
class Routing:
    """Routing statistics of a model; over data-parallel ranks, `aux` is to be averaged and `load` summed."""

    aux: torch.Tensor
    """[layers] fp32: `balance_loss`, mean over micro-batches."""
    load: torch.Tensor
    """[layers, experts] int64: how often each expert was picked; the sum of a layer is tokens · k, none is dropped."""

    def imbalance(self) -> torch.Tensor:
        """[layers]: load of the busiest expert over the mean load; 1 when balanced, experts / k at worst."""
        return self.load.amax(1) / self.load.double().mean(1)


class RouterWatch:
    """Balances the routers of a model in training mode and counts what they pick.

    The gradient gets that of `scale` · `aux_weight` · (mean of `balance_loss` over the `layers` MoE layers of the whole model,
    of which this may be a part), as if it stood in the loss; it is put in where the backward pass comes through the weights of
    a router. Forward passes inside a backward pass, which is what activation checkpointing does, are not counted again.

    Build it on the module of a finished training engine, because an engine may replace routers (AutoEP) and narrow their
    buffers, and before a checkpoint is loaded.

    Raises `SpecError` naming `section` in the first forward pass if a router cannot be read. Whether it scores by softmax or
    sigmoid is told from its weights then; where these say nothing (k = 1, scaled to sum 1) it counts as softmax.
    """

    def __init__(self, model: nn.Module, aux_weight: float, scale: float, layers: int, section: str) -> None:
        self.scale = scale
        """Factor applied to the loss of a micro-batch before its backward pass; may be set anew before any forward pass."""
        self._weight = aux_weight
        self._layers = layers
        self._section = section
        self._routers: list[Any] = list(routers(model).values())
        self._score: dict[int, str] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._passes = [0] * len(self._routers)
        self._aux = torch.zeros(len(self._routers))
        self._load = torch.zeros(len(self._routers), self._routers[0].num_experts if self._routers else 0, dtype=torch.int64)
        for index, router in enumerate(self._routers):
            if isinstance(getattr(router, "gate", None), nn.Linear):
                router.gate.register_forward_hook(self._logits_hook(index))
            router.register_forward_hook(self._hook(index))
            if (bias := _bias(router)) is not None:
                router.e_score_correction_bias = bias.float()  # in bf16, steps of 0.001 round away

    @property
    def biased(self) -> bool:
        """Return whether each router has a selection bias that `update_bias` can move."""
        return all(_bias(router) is not None for router in self._routers)

    def take(self) -> Routing:
        """Return the routing statistics since the last call, on this rank, and reset them."""
        passes = torch.tensor(self._passes, device=self._aux.device).clamp(min=1)
        taken = Routing(self._aux / passes, self._load)
        self._passes = [0] * len(self._routers)
        self._aux, self._load = torch.zeros_like(self._aux), torch.zeros_like(self._load)
        self._logits.clear()
        return taken

    @torch.no_grad()
    def update_bias(self, rate: float, load: torch.Tensor) -> None:
        """Make experts with more than the mean `load` [layers, experts] less likely to be picked, the others more.

        bias += rate · sign(mean load - load) (arXiv 2408.15664, algorithm 1), after an optimizer step. With a load summed over
        the data-parallel ranks the biases stay the same on all of them. Only for `biased` routers.
        """
        steps = rate * torch.sign(load.double().mean(1, keepdim=True) - load)
        for router, step in zip(self._routers, steps, strict=True):
            router.e_score_correction_bias.add_(step)

    def _logits_hook(self, index: int) -> Hook:
        """For AutoEP's router, which keeps its logits to itself."""

        def hook(gate: nn.Module, _args: Any, logits: torch.Tensor) -> None:
            if gate.training:
                self._logits[index] = logits

        return hook

    def _hook(self, index: int) -> Hook:
        def hook(router: nn.Module, _args: Any, output: Any) -> Any:
            if not router.training:
                return None
            logits, weights, picked, place = self._read(router, output, self._logits.pop(index, None))
            if index not in self._score:
                self._score[index] = self._score_of(router, logits, weights, picked)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._weight != 0):
                aux = balance_loss(SCORES[self._score[index]](logits), picked)
            if not _in_backward():
                self._count(index, aux.detach(), _counts(picked, logits.shape[1]))
            if self._weight == 0:
                return None
            weights = _AddGradient.apply(weights, aux, self.scale * self._weight / self._layers)
            return (*output[:place], weights, *output[place + 1 :])

        return hook

    def _count(self, index: int, aux: torch.Tensor, load: torch.Tensor) -> None:
        self._passes[index] += 1
        self._aux, self._load = self._aux.to(aux.device), self._load.to(load.device)
        self._aux[index] += aux
        self._load[index] += load

    def _read(
        self, router: nn.Module, output: Any, logits: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Logits [tokens, experts], weights and expert ids [tokens, k], and where in `output` the weights stand."""
        if isinstance(output, tuple) and len(output) == 3:
            if output[2].ndim == 2:  # transformers: logits, weights, ids
                return *output, 1
            if logits is not None:  # AutoEP: weights, ids, counts
                return logits, output[0], output[1], 0
        raise SpecError(f"{self._section}: {type(router).__name__} does not put out logits, weights and expert ids")

    @torch.no_grad()
    def _score_of(self, router: nn.Module, logits: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor) -> str:
        """The name of the score that `weights` were made from; a router may scale them, or scale them to sum 1."""
        gaps: dict[str, float] = {}
        for name, score in SCORES.items():
            made = score(logits).gather(1, picked)
            gaps[name] = float((made / made.sum(1, keepdim=True) - weights / weights.sum(1, keepdim=True)).abs().mean())
        closest = min(gaps, key=lambda name: gaps[name])
        if not gaps[closest] <= 8 * max(torch.finfo(logits.dtype).eps, torch.finfo(weights.dtype).eps):
            raise SpecError(f"{self._section}: {type(router).__name__} scores its experts by neither softmax nor sigmoid")
        return closest


class _AddGradient(torch.autograd.Function):
    """`weights` as they are; backward gives `aux` the gradient `factor`."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, aux: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.gradient = torch.full_like(aux, factor)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], ctx.gradient, None


def _counts(picked: torch.Tensor, experts: int) -> torch.Tensor:
    """[experts] int64: how often each id stands in `picked`. Unlike bincount, no GPU has to wait for it."""
    flat = picked.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _bias(router: nn.Module) -> torch.Tensor | None:
    return dict(router.named_buffers(recurse=False)).get("e_score_correction_bias")


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # what FSDP asks as well
