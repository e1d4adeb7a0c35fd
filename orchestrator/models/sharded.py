"""A causal LM spread over the processes of a group: tensor parallel, as transformers plans it for the architecture.

All processes run the same forward pass and hold the same hidden states; attention heads, feed-forward channels, experts'
channels and the vocabulary are shared out. What is made of the vocabulary's shares, logits, is put together by `ShardedHead`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from orchestrator.errors import SpecError
from orchestrator.losses.head import Head
from orchestrator.models.build import load_model, outline
from orchestrator.models.features import blocks

KEY_PROJECTIONS = ("k_proj", "v_proj")
GROUPED_GEMM = 8
"""Rows of a grouped GEMM's matrices must start at multiples of 16 bytes: 8 channels in bf16."""


def check_shards(model: PreTrainedModel, shards: int) -> None:
    """Raise `SpecError` if `model`, of which an outline will do, cannot be spread over `shards` processes."""
    name, config = type(model).__name__, model.config.get_text_config()
    plan: dict[str, str] = model.tp_plan
    if not model.base_model.tp_plan:
        raise SpecError(f"teacher.shards: transformers has no tensor-parallel plan for {name}")
    heads, key_heads = _heads(config)
    if heads % shards:
        raise SpecError(f"teacher.shards: {shards} do not divide the {heads} attention heads of {name}")
    if key_heads % shards and (shards % key_heads or not _key_projections(plan)):
        raise SpecError(f"teacher.shards: {shards} neither divide the {key_heads} key heads of {name} nor are divided by them")
    width = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 0)
    if "moe_tp_experts" in plan.values() and width % (GROUPED_GEMM * shards):
        raise SpecError(
            f"teacher.shards: {shards} cannot share {width} channels of each expert of {name} in multiples of {GROUPED_GEMM}"
        )


def load_share(folder: Path, dtype: Literal["bf16", "fp32"], on: torch.device) -> PreTrainedModel:
    """This process's share of the causal LM in `folder`, spread over the default process group; no more is read.

    Where there are fewer key heads than processes, each holds all key heads and uses its own. Raises `SpecError` for a model
    that cannot be read or not be spread.
    """
    shards, shard = dist.get_world_size(), dist.get_rank()
    shape = outline(folder)
    check_shards(shape, shards)
    heads, key_heads = _heads(shape.config.get_text_config())
    split = key_heads % shards == 0
    plan = "auto" if split else dict.fromkeys(_key_projections(shape.tp_plan), "replicate")
    model = load_model(folder, dtype, on, DistributedConfig(tp_size=shards, tp_plan=plan))
    if not split:
        _use_key_head(model, shard * key_heads // shards, heads // shards)
    return model


def _use_key_head(model: PreTrainedModel, head: int, queries: int) -> None:
    """Have attention use key head `head` alone, for the `queries` query heads that are here."""
    for block in blocks(model):
        attention: Any = block.self_attn
        mine = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        for name in KEY_PROJECTIONS:
            getattr(attention, name).register_forward_hook(lambda _module, _args, output, mine=mine: output[..., mine])
        attention.num_key_value_groups = queries


class ShardedHead:
    """The head of a model whose vocabulary is spread over a process group.

    All processes of the group must call it together. The states that the first of them gives count; all get the logits.
    """

    @torch.no_grad()
    def __init__(self, head: Head) -> None:
        """`head` as it was taken out of the model; raises `SpecError` if it is shared out in another way."""
        weight = head.weight
        if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
            raise SpecError("teacher.shards: transformers' plan for this model does not spread the head over its vocabulary")
        bias = head.bias.to_local() if isinstance(head.bias, DTensor) else head.bias
        self._part = replace(head, weight=weight.to_local(), bias=bias)
        self._group = weight.device_mesh.get_group()
        self._shards = weight.device_mesh.size()
        self.vocab_size, self.width = weight.shape

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab], fp32, of `hidden` [..., width]."""
        hidden = hidden.to(self._part.weight.dtype).contiguous()
        dist.broadcast(hidden, group=self._group, group_src=0)
        part = self._part(hidden)
        even = -(-self.vocab_size // self._shards)
        part = torch.nn.functional.pad(part, (0, even - part.shape[-1]))  # the last processes may have fewer ids
        parts = part.new_empty((self._shards, *part.shape))
        dist.all_gather_single(parts, part[None], group=self._group)
        return parts.movedim(0, -2).flatten(-2)[..., : self.vocab_size]


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Query heads and key heads."""
    heads: int = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _key_projections(plan: dict[str, str]) -> list[str]:
    """The rules of `plan` that share out keys and values by head."""
    return [name for name, style in plan.items() if name.rpartition(".")[2] in KEY_PROJECTIONS and style == "colwise"]
