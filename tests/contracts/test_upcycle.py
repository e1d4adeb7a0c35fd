"""A mixture made of a dense decoder is the same function at step 0, and stays it on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model, load_model
from orchestrator.models.upcycle import upcycle
from orchestrator.spec.model import Model

VOCAB, EXPERTS, PICKED = 67, 4, 2
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
MODELS: dict[str, Model] = {
    "llama": Model(type="llama", config={**SMALL, "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3}),
    "llama-tied-wide-heads": Model(type="llama", config={**SMALL, "tie_word_embeddings": True, "head_dim": 12}),
    "llama-gelu": Model(type="llama", config={**SMALL, "hidden_act": "gelu", "max_position_embeddings": 128}),
    "mistral-window": Model(type="mistral", config={**SMALL, "sliding_window": 4}),
    "mistral": Model(type="mistral", config={**SMALL, "sliding_window": None, "head_dim": 12}),
    "qwen3-tied": Model(type="qwen3", config={**SMALL, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-bias": Model(type="qwen3", config={**SMALL, "head_dim": 8, "attention_bias": True}),
    "qwen3-window": Model(type="qwen3", config={**SMALL, "head_dim": 8, "max_window_layers": 0, **WINDOW}),
    "qwen3-window-above-all-layers": Model(type="qwen3", config={**SMALL, "head_dim": 8, "max_window_layers": 3, **WINDOW}),
}


def dense(name: str, seed: int) -> Any:
    """A model with weights large enough that every part of it shows in the logits, biases included."""
    model = build_model(MODELS[name], VOCAB, seed, "student").eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any, seed: int) -> torch.Tensor:
    ids = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, use_cache=False).logits


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, in standard deviations of `one`."""
    return float((one - other).abs().max() / one.std())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_at_step_0(seed: int, name: str, tmp_path: Path) -> None:
    model = dense(name, seed)
    before, weights = logits(model, seed), {key: value.clone() for key, value in model.state_dict().items()}
    mixture: Any = upcycle(model, EXPERTS, PICKED, 0.0, seed, "student.upcycle")
    assert gap(before, logits(mixture, seed)) <= 1e-5
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for config in (mixture.config, mixture.base_model.config):
        assert (config.num_experts, config.num_experts_per_tok) == (EXPERTS, PICKED)
        for key in ("rope_parameters", "rms_norm_eps", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
            assert getattr(config, key) == getattr(model.config, key), key
    tied = mixture.get_output_embeddings().weight is mixture.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings

    mixture.save_pretrained(tmp_path)
    reloaded = load_model(tmp_path, "fp32", torch.device("cpu"))
    assert type(reloaded) is type(mixture)
    assert torch.equal(logits(reloaded, seed), logits(mixture, seed))


@pytest.mark.parametrize("name", ["llama", "qwen3-tied"])
def test_noise_and_other_weights_than_a_sum_of_one_do_change_it(seed: int, name: str) -> None:
    model = dense(name, seed)
    before = logits(model, seed)
    for noise in (0.01, 0.1):
        mixture: Any = upcycle(model, EXPERTS, PICKED, noise, seed, "student.upcycle")
        assert gap(before, logits(mixture, seed)) > noise / 10
        experts: Any = mixture.base_model.get_submodule("layers.1.mlp.experts")
        ffn = model.base_model.layers[1].mlp
        added = experts.down_proj.detach() - ffn.down_proj.weight.detach()
        assert float(added.std() / ffn.down_proj.weight.detach().std()) == pytest.approx(noise, rel=0.1)
        assert float(torch.corrcoef(added.flatten(1))[0, 1]) == pytest.approx(0, abs=0.15), "each copy its own"

    mixture: Any = upcycle(model, EXPERTS, PICKED, 0.0, seed, "student.upcycle")
    for block in mixture.base_model.layers:
        block.mlp.gate.register_forward_hook(lambda _router, _args, out: (out[0], out[0].softmax(-1).gather(1, out[2]), out[2]))
    assert gap(before, logits(mixture, seed)) > 1e-2


def test_the_seed_makes_the_router_whatever_the_state_of_torch(seed: int) -> None:
    model = dense("llama", seed)
    torch.manual_seed(1)
    one = upcycle(model, EXPERTS, PICKED, 0.1, seed, "student").state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    two = upcycle(model, EXPERTS, PICKED, 0.1, seed, "student").state_dict()
    other = upcycle(model, EXPERTS, PICKED, 0.1, seed + 1, "student").state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "drawn from a generator of its own"
    for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        key = f"model.layers.0.mlp.{part}"
        assert not torch.equal(one[key], other[key])
    router = one["model.layers.0.mlp.gate.weight"]
    assert float(router.std()) == pytest.approx(model.config.initializer_range, rel=0.3)


def test_a_bf16_student_stays_one(seed: int) -> None:
    model = dense("llama", seed).to(torch.bfloat16)
    mixture: Any = upcycle(model, EXPERTS, PICKED, 0.1, seed, "student.upcycle")
    assert {weight.dtype for weight in mixture.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            Model(type="gemma3_text", config={**SMALL, "head_dim": 8}),
            r"'gemma3_text' has no .* valid are llama, mistral",
        ),
        (Model(type="mixtral", config={**SMALL, "num_local_experts": 4}), r"'mixtral' has no matching mixture"),
        (Model(type="llama", config={**SMALL, "mlp_bias": True}), r"has mlp_bias, which a mixtral cannot have"),
        (Model(type="llama", config={**SMALL, "attention_bias": True}), r"has attention_bias, which a mixtral"),
        (Model(type="qwen3", config={**SMALL, "head_dim": 8, "max_window_layers": 1, **WINDOW}), r"mix full and sliding"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(seed: int, model: Model, complaint: str) -> None:
    built = build_model(model, VOCAB, seed, "student")
    with pytest.raises(SpecError, match=rf"^student\.upcycle: .*{complaint}"):
        upcycle(built, EXPERTS, PICKED, 0.0, seed, "student.upcycle")


def test_a_folder_of_a_dense_model_can_be_upcycled(seed: int, tmp_path: Path) -> None:
    model = dense("qwen3-tied", seed)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mixture: Any = upcycle(loaded, EXPERTS, EXPERTS, 0.0, seed, "student.upcycle")
    assert gap(logits(model, seed), logits(mixture.eval(), seed)) <= 1e-5
