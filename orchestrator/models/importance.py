"""Importance of each part of a decoder, measured in forward passes over a calibration set.

Blocks by how little they leave their input as it is (ShortGPT's block influence, arXiv 2403.03853), everything else by the
size of its activations (Minitron, arXiv 2407.14679, section 2.2): mean over the positions of a row, L2 over the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.models.features import blocks, layer_count

Tensor = torch.Tensor

WIDTH_NORMS = (
    "norm",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
"""Last names of the modules that norm a vector of the residual stream's width."""


@dataclass(frozen=True)
class Importance:
    """Scores, fp64 on the CPU; of each row, what scores least is pruned first."""

    blocks: Tensor
    """[layers]: 1 - mean cosine between a block's input and its output."""
    width: Tensor
    """[hidden_size]: size of a channel as attention and FFN read it, after their norms; summed over both and all layers."""
    ffn: Tensor
    """[layers, intermediate_size]: size of the input of `down_proj`."""
    heads: Tensor
    """[layers, kv groups]: L2 norms of the outputs of a group's query heads as `o_proj` reads them, summed over the heads."""
    energy: dict[str, Tensor]
    """No score: by the name of a norm, [hidden_size], the channels' mean shares in the sum of squares that it divides by."""


@torch.no_grad()
def importance(model: PreTrainedModel, batches: Iterable[Tensor]) -> Importance:
    """Importance of the parts of `model`, which `check_prunable` must have let pass.

    `batches`, at least one, are ids [rows, seq] without padding. Rows may differ in length between batches; how they are cut
    into batches makes no difference. Dropout is off.
    """
    sums = _Sums(model)
    was_training = model.training
    model.eval()
    with sums.following(model):
        for ids in batches:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
            sums.positions += ids.numel()
    model.train(was_training)
    return sums.importance()


def width_norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By name, the norms of `model` over the width of the residual stream."""
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in WIDTH_NORMS}


class _Sums:
    """Running sums over everything seen, fp64: squared row means of activations, changes by the blocks, shares of channels."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        layers, groups = layer_count(model), config.num_key_value_heads
        room = {"dtype": torch.float64, "device": model.device}
        self.positions = 0
        self._heads = (groups, config.num_attention_heads // groups, -1)
        self._changes = torch.zeros(layers, **room)
        self._reads = torch.zeros(layers, 2, config.hidden_size, **room)
        self._ffn = torch.zeros(layers, config.intermediate_size, **room)
        self._groups = torch.zeros(layers, groups, **room)
        self._energy = {name: torch.zeros(config.hidden_size, **room) for name in width_norms(model)}
        self._epsilon = config.rms_norm_eps

    @contextmanager
    def following(self, model: PreTrainedModel) -> Iterator[None]:
        """Adds up what goes through `model` meanwhile."""
        handles = [handle for i, block in enumerate(blocks(model)) for handle in self._follow(i, block)]
        handles += [norm.register_forward_pre_hook(self._shares(name)) for name, norm in width_norms(model).items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, i: int, block: Any) -> Iterator[Any]:
        yield block.register_forward_hook(self._change(i))
        yield block.self_attn.q_proj.register_forward_pre_hook(_added_to(self._reads[i, 0]))
        yield block.mlp.up_proj.register_forward_pre_hook(_added_to(self._reads[i, 1]))
        yield block.mlp.down_proj.register_forward_pre_hook(_added_to(self._ffn[i]))
        yield block.self_attn.o_proj.register_forward_pre_hook(_added_to(self._groups[i], self._by_group))

    def _change(self, i: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(args[0].double(), after.double(), dim=-1)
            self._changes[i] += (1 - cosine).sum()

        return hook

    def _shares(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:
            squares = args[0].double().square() + self._epsilon  # as the norm's own sum has it, and never a sum of zero
            self._energy[name] += (squares / squares.sum(-1, keepdim=True)).sum((0, 1))

        return hook

    def _by_group(self, outputs: Tensor) -> Tensor:
        """[rows, seq, groups] from the outputs of all heads [rows, seq, heads * head_dim]"""
        return torch.linalg.vector_norm(outputs.unflatten(-1, self._heads), dim=-1, dtype=torch.float64).sum(-1)

    def importance(self) -> Importance:
        return Importance(
            blocks=(self._changes / self.positions).cpu(),
            width=self._reads.sqrt().sum((0, 1)).cpu(),
            ffn=self._ffn.sqrt().cpu(),
            heads=self._groups.sqrt().cpu(),
            energy={name: (total / self.positions).cpu() for name, total in self._energy.items()},
        )


def _added_to(total: Tensor, reduced: Callable[[Tensor], Tensor] = torch.abs) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any) -> None:
        total.add_(reduced(args[0]).mean(1, dtype=torch.float64).square().sum(0))

    return hook
