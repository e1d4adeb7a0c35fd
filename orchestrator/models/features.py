"""Access to the inner activations of a decoder: the output vectors of chosen parts of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import SpecError

PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "hidden": lambda block: block,
    "ffn": lambda block: block.mlp,
    "queries": lambda block: block.self_attn.q_proj,
    "keys": lambda block: block.self_attn.k_proj,
    "values": lambda block: block.self_attn.v_proj,
}
"""By part: the module of a decoder block that puts it out."""


@contextmanager
def captured(model: PreTrainedModel, names: Iterable[str], section: str) -> Iterator[dict[str, torch.Tensor]]:
    """A dict that fills with [rows, seq, width] by feature name (`values.3`) whenever `model` runs.

    Raises `SpecError` naming `section` for a layer or a part that `model` does not have.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [_module_of(model, name, section).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def layer_count(model: PreTrainedModel) -> int:
    """Blocks of `model`."""
    return len(blocks(model))


def feature_widths(model: PreTrainedModel, names: Iterable[str], section: str) -> dict[str, int]:
    """Width of each feature; raises `SpecError` naming `section` for one that `model` does not have."""
    config: Any = model.config.get_text_config()
    modules = {name: _module_of(model, name, section) for name in names}
    return {name: getattr(module, "out_features", config.hidden_size) for name, module in modules.items()}


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of `model`; raises `SpecError` where they cannot be told apart."""
    layers: Any = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SpecError(f"{type(model).__name__} is no decoder whose blocks can be told apart")
    return layers


def _module_of(model: PreTrainedModel, name: str, section: str) -> nn.Module:
    part, _, number = name.partition(".")
    layers = blocks(model)
    if int(number) > len(layers):
        raise SpecError(f"{section}: {name} asked for, but {type(model).__name__} has {len(layers)} layers")
    try:
        return PARTS[part](layers[int(number) - 1])
    except AttributeError as error:
        raise SpecError(f"{section}: {name} asked for, but layer {number} of {type(model).__name__} has no {part}") from error
