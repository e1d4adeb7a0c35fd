"""Training in fp8: linear layers that multiply 8-bit operands, through torchao."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.models.features import layer_count

Recipe = Literal["rowwise", "tensorwise", "blockwise"]
MULTIPLES: dict[Recipe, int] = {"rowwise": 16, "tensorwise": 16, "blockwise": 128}
"""Divisor of both dimensions of a layer, by recipe. Without emulation, also of the tokens in a micro-batch (rows x seq)."""
MIN_BLOCKS = 3
FP8_CAPABILITY = (8, 9)
"""CUDA compute capability from which on a GPU multiplies fp8: Ada and Hopper."""


def to_fp8(model: PreTrainedModel, recipe: Recipe, emulate: bool, section: str) -> list[str]:
    """Make the linear layers of the inner blocks of `model` compute in fp8, in place; returns their names.

    The first and the last block, embeddings, head and routers stay as they are, and so does a layer whose dimensions are
    no multiples of `MULTIPLES[recipe]` (or, for blockwise, that has a bias). The experts of an MoE are three-dimensional
    parameters and no linear layers: they stay bf16 too.

    Weights remain the same `Parameter` objects under the same names. Both operands of each of a layer's three products
    (output, gradient by input, gradient by weight) are scaled to the range of their format and rounded in every call:

    * rowwise: e4m3; a scale, a power of two, for each row of the left and each column of the right operand.
    * tensorwise: e4m3, gradients by the output e5m2; one scale for each tensor.
    * blockwise: e4m3; a scale for 1 x 128 activations and for 128 x 128 weights (DeepSeek-V3, arXiv:2412.19437, 3.3.2).

    Except for blockwise, a layer holds on to its weight from its forward to its backward pass; under ZeRO-3 that is the
    gathered one, so that without activation checkpointing the weights of all inner blocks come to be in memory at once.

    `emulate` rounds alike but multiplies in fp32, for devices without fp8; see `fp8_hardware`. Hooks set on a layer before
    are lost. Raises `SpecError` naming `section` for a model that has nothing to convert, and for blockwise anywhere but
    on a Hopper GPU, which alone multiplies so (and which `emulate` cannot stand for).
    """
    if recipe == "blockwise" and (emulate or _capability()[0] != 9):
        raise SpecError(f"{section}: blockwise fp8 needs a Hopper GPU; rowwise and tensorwise do without")
    count = layer_count(model)
    if count < MIN_BLOCKS:
        raise SpecError(
            f"{section}: fp8 leaves the first and the last block in bf16, and this model has {count} in all; "
            f"give it {MIN_BLOCKS} blocks or more, or use bf16"
        )
    chosen = _inner_layers(model, recipe)
    if not chosen:
        raise SpecError(
            f"{section}: no linear layer in the inner blocks of {type(model).__name__} that {recipe} fp8 can take: "
            f"both dimensions must be multiples of {MULTIPLES[recipe]}" + (", without a bias" if recipe == "blockwise" else "")
        )
    _convert(model, recipe, emulate, chosen)
    return chosen


def fp8_hardware() -> bool:
    """Return whether this process's CUDA device multiplies fp8. A process that works on its CPU must emulate regardless."""
    return _capability() >= FP8_CAPABILITY


def _capability() -> tuple[int, int]:
    """Compute capability of this process's CUDA device, (0, 0) without one; ROCm counts in another way."""
    return torch.cuda.get_device_capability() if torch.version.cuda and torch.cuda.is_available() else (0, 0)


def _inner_layers(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    blocks: Any = model.base_model.layers
    inner = {module for block in blocks[1:-1] for module in block.modules()}
    return [name for name, module in model.named_modules() if module in inner and _eligible(name, module, recipe)]


def _eligible(name: str, module: nn.Module, recipe: Recipe) -> bool:
    # A subclass of nn.Linear computes something of its own, which a conversion would drop.
    if type(module) is not nn.Linear or (recipe == "blockwise" and module.bias is not None):
        return False
    routes = any(part == "gate" or "router" in part for part in name.split("."))
    return not routes and not any(size % MULTIPLES[recipe] for size in module.weight.shape)


def _convert(model: PreTrainedModel, recipe: Recipe, emulate: bool, chosen: list[str]) -> None:
    def wanted(_module: nn.Module, name: str) -> bool:
        return name in chosen

    if recipe == "blockwise":
        from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinearConfig  # needs triton
        from torchao.quantization import quantize_

        quantize_(model, Float8BlockwiseLinearConfig(), filter_fn=wanted)
    else:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # two seconds

        config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
        convert_to_float8_training(model, config=config, module_filter_fn=wanted)
