"""Expert parallelism with DeepSpeed AutoEP: each rank of a group holds a part of the experts, and tokens travel to theirs.

Every rank trains on its own rows, so the ranks are data-parallel for all other weights. A group of `size` ranks that follow
one another holds each expert once; an expert's gradient is summed over the ranks that hold it and divided by the number of
all ranks, which makes it the mean over the global batch like any other. No token is dropped.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.student._compat import recorders_by_name
from orchestrator.student.preflight import FAMILIES
from orchestrator.student.sharded import once


def check_experts(model: PreTrainedModel, size: int, section: str) -> None:
    """Raise `SpecError` if the experts of `model`, of one of `FAMILIES`, cannot be spread over `size` ranks.

    `section` is that of the training, `train` or `teacher.train`.
    """
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    config: Any = model.config
    assert config.model_type in FAMILIES
    if getattr(config, "router_jitter_noise", 0):
        raise SpecError(f"{section}.parallel.kind: 'expert' has no router_jitter_noise, which the model asks for")
    # Without the pattern of `deepspeed_config`: the names in here begin at the model, not at what is around it.
    asked = parse_autoep_config({"enabled": True, "autoep_size": size})
    try:
        layers = AutoEP(model, asked).ep_parser()
    except ValueError as error:
        raise SpecError(f"{section}.parallel.kind: 'expert' cannot train this model: {error}") from error
    for layer in layers:
        if layer.num_experts % size:
            raise SpecError(f"{section}.parallel.size: {size} workers cannot share the {layer.num_experts} experts of a layer")


@contextmanager
def experts_in_sight(distiller: nn.Module, model: PreTrainedModel) -> Generator[None]:
    """While it lasts, `deepspeed.initialize` can tell from `distiller` what kind of model is in it, and replace its blocks.

    The parameter groups that it is given must have names: DeepSpeed splits each into its experts and the rest.
    """
    distiller.config = model.config  # type: ignore[assignment]
    with recorders_by_name():
        yield
    del distiller.config


def expert_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a model whose experts are spread, as `Trainer.tensors` has them; under any ZeRO stage."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    layers = {f"{name}.": layer for name, layer in model.named_modules() if isinstance(layer, AutoEPMoELayer)}
    first = dist.get_rank() == 0
    for name, value in once(dict(_beside_experts(model, layers))):
        whole = _whole(value)
        if first:
            yield name, whole.to("cpu", dtype if isinstance(value, nn.Parameter) else None)
    for prefix, layer in layers.items():
        gate, up = (_all_experts(layer, own) for own in (layer.experts.w1, layer.experts.w3))
        if first:
            yield f"{prefix}experts.gate_up_proj", torch.cat([gate, up], 1).to("cpu", dtype)
        del gate, up
        down = _all_experts(layer, layer.experts.w2)
        if first:
            yield f"{prefix}experts.down_proj", down.to("cpu", dtype)


def _beside_experts(model: nn.Module, layers: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of all but the experts, under the names they had before DeepSpeed replaced the `layers`."""
    from deepspeed.module_inject.auto_ep_presets.registry import get_preset

    for name, value in model.state_dict(keep_vars=True).items():
        if not name.startswith(tuple(layers)):
            yield name, value
    for prefix, layer in layers.items():
        preset = get_preset(layer.model_family)
        for name, value in layer.router.state_dict(keep_vars=True).items():
            yield f"{prefix}{preset.router_pattern}.{name.removeprefix('gate.')}", value
        shared = {
            preset.shared_experts_pattern: layer.shared_experts,
            preset.shared_experts_gate_pattern: layer.shared_experts_gate,
        }
        for part_name, part in shared.items():
            for name, value in part.state_dict(keep_vars=True).items() if part is not None else ():
                yield f"{prefix}{part_name}.{name}", value


def _whole(value: torch.Tensor) -> torch.Tensor:
    """A copy of `value`, which under ZeRO-3 is gathered first."""
    from deepspeed import zero

    with zero.GatheredParameters([value]):
        return value.detach().clone()


def _all_experts(layer: Any, own: torch.Tensor) -> torch.Tensor:
    """The weights [experts, ...] of which `own` are this rank's, on the first rank of a group; on the others only these."""
    part = _whole(own)
    parts = [torch.empty_like(part) for _ in range(layer.ep_size)] if layer.ep_rank == 0 else None
    dist.gather(part, parts, group=layer.ep_group, group_dst=0)
    return part if parts is None else torch.cat(parts)
