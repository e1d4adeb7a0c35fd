"""Parameter counts of the planner against models that are built and against what papers report."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.plan.sizes import DECODERS, DEFAULTS, Decoder, decoder, with_mtp
from orchestrator.spec.model import Model

DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}
"""As published."""


def known(kind: str, config: dict[str, Any], vocab: int | None = None) -> Decoder:
    model = decoder(kind, config, vocab)
    assert model is not None
    return model


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_group": 2}
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (DECODERS, {}),
    "tied": (DECODERS, {"tie_word_embeddings": True}),
    "untied": (DECODERS, {"tie_word_embeddings": False}),
    "grouped queries": (tuple(k for k in DECODERS if k != "deepseek_v3"), {"num_key_value_heads": 2}),
    "own head size": (("llama", "mistral", "qwen3", "gemma3_text", "mixtral"), {"num_key_value_heads": 1, "head_dim": 10}),
    "heads as null": (("llama", "qwen2", "qwen3", "deepseek_v3"), {"num_key_value_heads": None}),
    "biases": (("llama", "qwen3", "gemma3_text", "qwen3_moe", "deepseek_v3"), {"attention_bias": True}),
    "biases in the feed-forward part": (("llama",), {"mlp_bias": True}),
    "few experts": (("mixtral", "qwen3_moe"), {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "narrow experts": (("qwen3_moe", "deepseek_v3"), {"moe_intermediate_size": 20, "num_experts_per_tok": 3}),
    "every other block routed": (("qwen3_moe",), {"decoder_sparse_step": 2, "num_local_experts": 6}),
    "some blocks dense": (("qwen3_moe",), {"mlp_only_layers": [0, 2]}),
    "queries at once": (("deepseek_v3",), {"q_lora_rank": None, "n_routed_experts": 8}),
    "shared experts": (("deepseek_v3",), {"n_shared_experts": 3, "first_k_dense_replace": 1, "n_routed_experts": 6}),
    "all routed": (("deepseek_v3",), {"first_k_dense_replace": 0, "n_routed_experts": 4}),
}


@pytest.mark.parametrize(("kind", "variant"), [(k, v) for v, (kinds, _) in VARIANTS.items() for k in kinds])
def test_parameters_are_those_of_the_model_built(kind: str, variant: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SHAPE, "vocab_size": 101, **(MLA if kind == "deepseek_v3" else {}), **VARIANTS[variant][1]}
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    model = known(kind, config)
    assert model.total == sum(p.numel() for p in built.parameters())
    layers = built.model.layers
    assert [block.total for block in model.blocks] == [sum(p.numel() for p in layer.parameters()) for layer in layers]
    stored = [sum(p.numel() for n, p in layer.named_parameters() if ".experts." in n) for layer in layers]
    assert [block.experts * block.expert for block in model.blocks] == stored
    assert model.embedding == built.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("kind", DECODERS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(kind)
    assert {key: getattr(defaults, key) for key in DEFAULTS[kind]} == DEFAULTS[kind]
    expected = known(kind, defaults.to_dict())
    assert known(kind, {}) == expected, "a written-out configuration means the same"


def test_other_names_of_a_key_count() -> None:
    assert known("qwen3_moe", {"num_experts": 7}) == known("qwen3_moe", {"num_local_experts": 7})
    assert known("deepseek_v3", {"num_local_experts": 8}) == known("deepseek_v3", {"n_routed_experts": 8})


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", SHAPE),
        ("llama", SHAPE | {"hidden_size": "32"}),
        ("llama", SHAPE | {"num_attention_heads": 0}),
        ("llama", SHAPE | {"num_hidden_layers": 10**9}),
        ("llama", SHAPE | {"head_dim": "wide"}),
        ("qwen3_moe", SHAPE | {"decoder_sparse_step": 0}),
    ],
)
def test_what_is_not_known_is_said_to_be_unknown(kind: str, config: dict[str, Any]) -> None:
    assert decoder(kind, config, 101) is None


def test_deepseek_v3_has_the_parameters_it_is_published_with() -> None:
    """671B in all and 37B active without the multi-token prediction module; 685B as published, with the module's own copies
    of embedding and head (arXiv:2412.19437 and its model card)."""
    model = known("deepseek_v3", DEEPSEEK_V3)
    assert model.total == 671_026_404_352
    assert round(model.total / 1e9) == 671
    assert (model.active - model.embedding) // 10**9 == 36 and model.active // 10**9 == 37
    as_published = with_mtp(model, 1).total + 2 * model.embedding
    assert round(as_published / 1e9) == 684, "and the card says 685, with fp8's scales"


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_multi_token_prediction_is_counted_as_it_is_built(kind: str) -> None:
    from orchestrator.models.build import build_model
    from orchestrator.models.mtp import MultiTokenPrediction

    model = known(kind, SHAPE, 101)
    built = build_model(Model(type=kind, config=SHAPE), 101, 0, "student")
    counted = with_mtp(model, 2)
    assert counted.total - model.total == sum(p.numel() for p in MultiTokenPrediction(built, 2, 0).parameters())
    again = counted.blocks[-1].active - counted.blocks[-1].norms + model.vocab * model.width
    assert counted.multiplied == model.multiplied + 2 * again, "each depth passes a block and the head once more"


@pytest.mark.parametrize(
    ("kind", "config", "total", "active"),
    [
        ("mixtral", {}, 46.7, 12.9),
        ("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128}, 30.5, 3.35),
        ("llama", {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}, 8.03, 8.03),
    ],
)
def test_published_models(kind: str, config: dict[str, Any], total: float, active: float) -> None:
    """Mixtral 8x7B, Qwen3-30B-A3B, Llama 3 8B; in billions, to three digits."""
    model = known(kind, config)
    assert model.total / 1e9 == pytest.approx(total, rel=2e-3)
    assert model.active / 1e9 == pytest.approx(active, rel=2e-3)
