"""A dense decoder made a mixture of experts that starts as the same function (Komatsuzaki et al., arXiv 2212.05055)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from orchestrator.errors import SpecError

MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""By the `model_type` of a dense decoder: that of the mixture whose blocks are the same but for the FFN."""

SLIDING, FULL = {"sliding_attention"}, {"full_attention"}


def upcycle(
    model: PreTrainedModel, experts: int, experts_per_token: int, noise: float, seed: int, section: str
) -> PreTrainedModel:
    """`model` with `experts` copies of the FFN in each layer and a router that picks `experts_per_token` of them.

    The weights of the picked experts sum to 1, so with `noise` 0 the logits are those of `model`. `noise` is the standard
    deviation of what is added to each copy, relative to that of the copied weights. The same `seed` gives the same routers and
    the same noise on every machine. `model` itself stays as it is.

    Raises `SpecError` naming `section` for a type that no mixture matches and for a value that the mixture cannot hold.
    """
    config = mixture_config(model.config, experts, experts_per_token, section)
    with no_init_weights(), torch.device(model.device):  # every weight is set below
        mixture: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    mixture.tie_weights()
    dense: Any = model.base_model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in mixture.base_model.layers:
            _draw(block.mlp.gate.weight, config.initializer_range, generator)
        kept = dict(mixture.named_parameters())
        for name, weight in model.named_parameters():
            if ".mlp." not in name:
                kept[name].copy_(weight)
        for block, source in zip(mixture.base_model.layers, dense.layers, strict=True):
            gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
            _fill(block.mlp.experts.gate_up_proj, gate_up, noise, generator)
            _fill(block.mlp.experts.down_proj, source.mlp.down_proj.weight, noise, generator)
    mixture.generation_config = model.generation_config
    return mixture.train(model.training)


def mixture_config(dense: PreTrainedConfig, experts: int, experts_per_token: int, section: str) -> PreTrainedConfig:
    """The configuration of the mixture: all that both types know is taken from `dense`."""
    if dense.model_type not in MIXTURES:
        raise SpecError(f"{section}: {dense.model_type!r} has no matching mixture of experts; valid are {', '.join(MIXTURES)}")
    name = MIXTURES[dense.model_type]
    known = {field.name for field in fields(type(AutoConfig.for_model(name)))} - {"architectures"}
    for key in ("attention_bias", "mlp_bias"):
        if getattr(dense, key, False) and key not in known:
            raise SpecError(f"{section}: the student has {key}, which a {name} cannot have")
    values: dict[str, Any] = {field.name: getattr(dense, field.name) for field in fields(type(dense)) if field.name in known}
    values |= {"head_dim": dense.head_dim, "num_experts_per_tok": experts_per_token}
    if name == "mixtral":
        return AutoConfig.for_model(name, **values, num_local_experts=experts)
    kinds = set(dense.layer_types)
    if kinds not in (SLIDING, FULL):
        raise SpecError(f"{section}: the student's layers mix full and sliding attention, which a {name} cannot")
    values |= {"use_sliding_window": kinds == SLIDING, "moe_intermediate_size": dense.intermediate_size}
    return AutoConfig.for_model(name, **values, num_experts=experts, norm_topk_prob=True)


def _fill(copies: nn.Parameter, weight: torch.Tensor, noise: float, generator: torch.Generator) -> None:
    """Make each of `copies` [experts, out, in] a copy of `weight` [out, in] with noise of its own."""
    copies.copy_(weight.expand_as(copies))
    if noise:
        std = noise * float(weight.float().std())
        for copy in copies:
            added = torch.empty_like(copy)
            _draw(added, std, generator)
            copy.add_(added)


def _draw(tensor: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill `tensor` with Gaussian numbers, drawn in fp32 on the CPU so that they are the same everywhere."""
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
