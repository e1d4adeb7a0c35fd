"""fp8 layers compute what the formats say, in the inner blocks alone, and leave a model's weights and names as they were."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model
from orchestrator.models.features import captured, feature_widths
from orchestrator.models.fp8 import Recipe, fp8_hardware, to_fp8
from orchestrator.models.head import last_hidden
from orchestrator.spec.model import Model

VOCAB = 64
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
INNER = [f"model.layers.{block}.{layer}" for block in (1, 2) for layer in PROJECTIONS]
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)
"""Bits of the mantissa, smallest exponent of a normal number, largest number (OCP 8-bit floating point, table 1)."""


def built(seed: int, kind: str = "llama", **config: Any) -> Any:
    model = build_model(Model(type=kind, config=SMALL | config), VOCAB, seed, "student")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(seed))
    return model


def token_ids(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(seed))


# An emulation of its own, in float64 and without torch's fp8 types.


def rounded(x: torch.Tensor, kind: tuple[int, int, float], dim: int | None) -> torch.Tensor:
    """`x` scaled to the range of a format along `dim` (as a whole without one), rounded half to even, scaled back."""
    mantissa, smallest, largest = kind
    peak = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest / peak.clamp_min(1e-12)
    if dim is not None:
        scale = 2.0 ** scale.log2().floor()
    scaled = x * scale
    exponent = scaled.abs().clamp_min(1e-300).log2().floor().clamp_min(smallest)
    spacing = 2.0 ** (exponent - mantissa)
    return ((scaled / spacing).round() * spacing).clamp(-largest, largest) / scale


class Emulated(torch.autograd.Function):
    """x [tokens, in] times weight [out, in]; each product scales its operands along what it sums over."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return Emulated.quantised(recipe, x, 1) @ Emulated.quantised(recipe, weight, 1).T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        (x, weight), recipe, (grad,) = ctx.saved_tensors, ctx.recipe, grads
        kind = E4M3 if recipe == "rowwise" else E5M2
        grad_x = Emulated.quantised(recipe, grad, 1, kind) @ Emulated.quantised(recipe, weight, 0)
        grad_weight = Emulated.quantised(recipe, grad, 0, kind).T @ Emulated.quantised(recipe, x, 0)
        return grad_x, grad_weight, None

    @staticmethod
    def quantised(recipe: Recipe, x: torch.Tensor, dim: int, kind: tuple[int, int, float] = E4M3) -> torch.Tensor:
        return rounded(x, kind, dim if recipe == "rowwise" else None)


@dataclass
class Passage:
    """What went through a layer, both ways."""

    x: torch.Tensor
    y: torch.Tensor
    grad_y: torch.Tensor
    grad_x: torch.Tensor


def passages(model: Any, seed: int) -> dict[str, Passage]:
    """Of each inner layer, by name, while the model runs and gradients come back."""
    found: dict[str, Passage] = {}
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(layer: nn.Module, given: Any, y: torch.Tensor) -> None:
        kept[names[layer]] = given[0].detach(), y.detach()

    def backward(layer: nn.Module, grad_x: Any, grad_y: Any) -> None:
        found[names[layer]] = Passage(*kept[names[layer]], grad_y[0], grad_x[0])

    names = {model.get_submodule(name): name for name in INNER}
    for layer in names:
        layer.register_forward_hook(forward)
        layer.register_full_backward_hook(backward)
    run(model, seed)
    assert found.keys() == set(INNER)
    return found


def products(passage: Passage, layer: nn.Linear, recipe: Recipe | None) -> dict[str, torch.Tensor]:
    """The same passage in float64: output and gradients, in the formats of `recipe` or, without one, exactly."""
    x, weight = (t.detach().double().requires_grad_() for t in (passage.x, layer.weight))
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    flat = x.flatten(0, -2)
    out: Any = flat @ weight.T if recipe is None else Emulated.apply(flat, weight, recipe)
    y = out.unflatten(0, x.shape[:-1]) + bias
    y.backward(passage.grad_y.double())
    assert x.grad is not None and weight.grad is not None
    return {"y": y.detach(), "grad_x": x.grad, "grad_weight": weight.grad, "grad_bias": passage.grad_y.double().sum((0, 1))}


def run(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Last hidden state and, of its product with something random, all gradients, in float64."""
    hidden = last_hidden(model, token_ids(seed))
    towards = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed + 1))
    (hidden * towards.to(hidden)).sum().backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach().double(), **grads}


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm, by name of what was found."""
    return {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in found}


def typical_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Median over the elements of the difference, over the root mean square of the expected elements."""
    return {
        name: float((found[name] - expected[name]).abs().median() / expected[name].square().mean().sqrt()) for name in found
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("recipe", "emulate"), [("rowwise", True), ("tensorwise", True), ("tensorwise", False)])
def test_output_and_gradients_are_those_of_the_formats(seed: int, recipe: Recipe, emulate: bool, kind: str) -> None:
    model = built(seed, kind)  # that of qwen2 has biases
    assert to_fp8(model, recipe, emulate, "train.precision") == INNER
    other: Recipe = "rowwise" if recipe == "tensorwise" else "tensorwise"
    for name, passage in passages(model, seed).items():
        layer = model.get_submodule(name)
        found = {"y": passage.y, "grad_x": passage.grad_x, "grad_weight": layer.weight.grad}
        found |= {} if layer.bias is None else {"grad_bias": layer.bias.grad}
        off, from_exact, from_other = (errors(found, products(passage, layer, r)) for r in (recipe, None, other))
        # A scale is rounded to fp32, by which a value beside a tie may go the other way. Its row or column of a product then
        # differs; the other elements do not.
        assert max(off.values()) < 5e-3, name
        assert max(typical_errors(found, products(passage, layer, recipe)).values()) < 1e-6, name
        for control in (from_exact, from_other):
            assert min(control[part] for part in ("y", "grad_x", "grad_weight")) > 0.01, name


def test_bf16_weights_and_inputs(seed: int) -> None:
    model = built(seed).bfloat16()
    exact = run(copy.deepcopy(model).double(), seed)
    bf16 = errors(run(copy.deepcopy(model), seed), exact)
    to_fp8(model, "rowwise", True, "train.precision")
    fp8 = errors(run(model, seed), exact)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
    assert fp8["hidden"] > 2 * bf16["hidden"]
    assert max(fp8.values()) < 0.3


def test_names_and_weights_are_those_of_the_plain_model(seed: int, tmp_path: Path) -> None:
    model = built(seed, tie_word_embeddings=True)
    before = dict(model.named_parameters(remove_duplicate=False))
    model.save_pretrained(tmp_path / "plain")
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert to_fp8(model, "rowwise", True, "train.precision") == INNER

    changed = [name for name, module in model.named_modules() if type(module) is not kinds[name]]
    assert changed == INNER, "blocks 0 and 3, embeddings and head are what they were"
    after = dict(model.named_parameters(remove_duplicate=False))
    assert [*after] == [*before]
    assert all(after[name] is before[name] for name in before), "an optimizer and tied weights keep what they hold"
    assert [*model.state_dict()] == [*before]

    model.save_pretrained(tmp_path / "fp8")
    assert (tmp_path / "fp8/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert (tmp_path / "fp8/config.json").read_bytes() == (tmp_path / "plain/config.json").read_bytes()


def test_features_are_still_found(seed: int) -> None:
    model = built(seed)
    widths = feature_widths(model, ["values.2", "ffn.3", "hidden.3"], "labels")
    to_fp8(model, "tensorwise", True, "train.precision")
    assert (
        feature_widths(model, ["values.2", "ffn.3", "hidden.3"], "labels")
        == widths
        == {"values.2": 32, "ffn.3": 64, "hidden.3": 64}
    )
    with captured(model, widths, "labels") as own:
        last_hidden(model, token_ids(seed))
    assert {name: states.shape[-1] for name, states in own.items()} == widths


def test_routers_and_experts_stay(seed: int) -> None:
    model = built(seed, "afmoe", num_experts=16, num_experts_per_tok=2, num_dense_layers=1, moe_intermediate_size=32)
    router, experts = (model.get_submodule(f"model.layers.1.mlp.{part}") for part in ("router.gate", "experts"))
    assert type(router) is nn.Linear and router.weight.shape == (16, 64), "it could be converted"
    names = to_fp8(model, "rowwise", True, "train.precision")
    assert "model.layers.1.self_attn.q_proj" in names
    assert "model.layers.1.mlp.shared_experts.up_proj" in names
    assert type(model.get_submodule("model.layers.1.mlp.router.gate")) is nn.Linear
    assert {p.dim() for p in experts.parameters()} == {3}
    run(model, seed)


def test_layers_of_other_dimensions_stay(seed: int) -> None:
    names = to_fp8(built(seed, intermediate_size=120), "rowwise", True, "train.precision")
    assert names == [name for name in INNER if "mlp" not in name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2}, "this model has 2 in all; give it 3 blocks or more"),
        ({"hidden_size": 72, "head_dim": 18}, "both dimensions must be multiples of 16"),
    ],
)
def test_nothing_to_convert_is_refused(seed: int, config: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=rf"^train\.precision: .*{message}"):
        to_fp8(built(seed, **config), "rowwise", True, "train.precision")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(("capability", "emulate"), [(None, False), ((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_blockwise_needs_hopper(
    seed: int, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, emulate: bool
) -> None:
    if capability:
        pretend_gpu(monkeypatch, capability)
    elif torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SpecError, match=r"^train\.precision: blockwise fp8 needs a Hopper GPU"):
        to_fp8(built(seed), "blockwise", emulate, "train.precision")


def test_fp8_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, able in {(8, 0): False, (8, 6): False, (8, 9): True, (9, 0): True, (12, 0): True}.items():
        pretend_gpu(monkeypatch, capability)
        assert fp8_hardware() == able
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not fp8_hardware()
