"""A pruned model is the model without its parts: the logits stay where the parts were dead, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model, outline
from orchestrator.models.importance import Importance, importance
from orchestrator.models.prune import check_prunable, prune
from orchestrator.spec.model import Model, PrunedStudent

VOCAB = 67
LAYERS, WIDTH, FFN, GROUPS, QUERIES, HEAD = 4, 32, 48, 2, 2, 8
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": GROUPS * QUERIES,
    "num_key_value_heads": GROUPS,
}
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {"sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
MODELS: dict[str, Model] = {
    "llama": Model(type="llama", config=SMALL),
    "llama-tied": Model(type="llama", config={**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": Model(type="mistral", config={**SMALL, "sliding_window": 4}),
    "qwen2-bias": Model(type="qwen2", config={**SMALL, "use_sliding_window": True, **MIXED}),
    "qwen3": Model(type="qwen3", config={**SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2-softcap": Model(type="gemma2", config={**SMALL, "head_dim": HEAD, "final_logit_softcapping": 30.0, **MIXED}),
    "gemma3": Model(type="gemma3_text", config={**SMALL, "head_dim": HEAD, **MIXED}),
    "gemma3-untied": Model(type="gemma3_text", config={**SMALL, "head_dim": HEAD, "tie_word_embeddings": False}),
    "smollm3": Model(type="smollm3", config={**SMALL, "pad_token_id": 0, "no_rope_layers": [1, 0, 1, 0]}),
    "granite-scale": Model(type="granite", config={**SMALL, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
}
DEAD_BLOCK = 1
"""Full attention without RoPE, where a model has both kinds: taken for its neighbour, it would change the logits."""


def built(name: str, seed: int) -> Any:
    """A model whose parts all matter: every weight and bias is random and large enough to be felt."""
    model: Any = build_model(MODELS[name], VOCAB, seed, "student").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            fan_in = 1 if weight.dim() == 1 else weight.shape[1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in)
            if weight.dim() == 1:
                weight.mul_(0.3).add_(1)
    return model


def ids(seed: int, rows: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, 11), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, seed: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(seed), use_cache=False).logits


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def all_alike() -> Importance:
    """Scores that prefer nothing, so that the last parts would go; without `energy`."""
    ones = torch.ones
    return Importance(ones(LAYERS), ones(WIDTH), ones(LAYERS, FFN), ones(LAYERS, GROUPS), {})


def measured(model: Any, scores: Importance, seed: int) -> Importance:
    """`scores` with the energy of `model`, on other ids than `logits` takes."""
    return replace(scores, energy=importance(model, [ids(seed + 1)]).energy)


def no_channels(model: Any, scores: Importance) -> None:
    """Makes channels of the residual stream zero, for everything that writes to it."""
    lost = [0, 5, 6, 7, 20, 30, 31, 19]
    model.get_input_embeddings().weight[:, lost] = 0
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight[lost] = 0
            if writer.bias is not None:
                writer.bias[lost] = 0
    scores.width[lost] = 0


def no_ffn(model: Any, scores: Importance) -> None:
    """Makes `down_proj` ignore FFN channels, others in each block."""
    for i, block in enumerate(model.model.layers):
        lost = [i, 3 * i + 4, 40 - i]
        block.mlp.down_proj.weight[:, lost] = 0
        scores.ffn[i, lost] = 0


def no_group(model: Any, scores: Importance) -> None:
    """Makes `o_proj` ignore a key/value group, another one in each block."""
    for i, block in enumerate(model.model.layers):
        size = block.self_attn.o_proj.in_features // GROUPS
        block.self_attn.o_proj.weight[:, (i % 2) * size : (i % 2 + 1) * size] = 0
        scores.heads[i, i % 2] = 0


def no_block(model: Any, scores: Importance) -> None:
    """Makes a block write nothing."""
    block = model.model.layers[DEAD_BLOCK]
    for writer in (block.self_attn.o_proj, block.mlp.down_proj):
        for weight in writer.parameters():
            weight.zero_()
    scores.blocks[DEAD_BLOCK] = 0


Kill = Callable[[Any, Importance], None]


def pruned(**sizes: int) -> PrunedStudent:
    """Without the checks of a job file, for `prune` has its own."""
    return PrunedStudent.model_construct(kind="pruned", **sizes)


KILLED: dict[str, tuple[Kill, PrunedStudent]] = {
    "hidden_size": (no_channels, pruned(hidden_size=24)),
    "intermediate_size": (no_ffn, pruned(intermediate_size=45)),
    "kv_heads": (no_group, pruned(kv_heads=1)),
    "layers": (no_block, pruned(layers=3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_pruned_is_the_same_model(seed: int, name: str) -> None:
    model = built(name, seed)
    state = torch.get_rng_state()
    made: Any = prune(model, pruned(), importance(model, [ids(seed)]), "student")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(made) is type(model)
    assert torch.equal(logits(made, seed), logits(model, seed))
    with torch.no_grad():
        made.get_input_embeddings().weight.zero_()
        assert model.get_input_embeddings().weight.abs().sum() > 0, "the new model shares nothing"
    tied = made.get_input_embeddings().weight is made.get_output_embeddings().weight
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("part", KILLED)
@pytest.mark.parametrize("name", MODELS)
def test_dead_parts_are_not_missed(seed: int, name: str, part: str) -> None:
    model, scores = built(name, seed), all_alike()
    kill, shape = KILLED[part]
    live: Any = prune(model, shape, measured(model, scores, seed), "student")
    assert not near(logits(live, seed), logits(model, seed)), "live parts are missed"
    with torch.no_grad():
        kill(model, scores)
    made: Any = prune(model, shape, measured(model, scores, seed), "student")
    assert near(logits(made, seed), logits(model, seed))
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_all_at_once_and_again_from_a_folder(seed: int, name: str, tmp_path: Path) -> None:
    model, scores = built(name, seed), all_alike()
    with torch.no_grad():
        for kill, _ in KILLED.values():
            kill(model, scores)
    shape = pruned(layers=3, hidden_size=24, intermediate_size=45, kv_heads=1)
    made: Any = prune(model, shape, measured(model, scores, seed), "student")
    assert near(logits(made, seed), logits(model, seed))
    config: Any = made.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 24, 45)
    assert (config.num_key_value_heads, config.num_attention_heads) == (1, QUERIES)
    for key in ("layer_types", "no_rope_layers"):
        if values := getattr(model.config, key, None):
            assert getattr(config, key) == [value for i, value in enumerate(values) if i != DEAD_BLOCK]

    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, seed), logits(made, seed))
    assert again.config.head_dim == model.model.layers[0].self_attn.head_dim


def test_what_is_kept_stays_in_its_order(seed: int) -> None:
    model, scores = built("qwen2-bias", seed), all_alike()
    generator = torch.Generator().manual_seed(seed)
    for tensor in (scores.blocks, scores.width, scores.ffn, scores.heads):
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    made: Any = prune(
        model, pruned(layers=2, hidden_size=16, intermediate_size=10, kv_heads=1), measured(model, scores, seed), "student"
    )
    width = sorted(range(WIDTH), key=lambda i: -scores.width[i])[:16]
    blocks = sorted(sorted(range(LAYERS), key=lambda i: -scores.blocks[i])[:2])
    width.sort()
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight[:, width])
    for block, was in zip(made.model.layers, blocks, strict=True):
        source = model.model.layers[was]
        ffn = sorted(sorted(range(FFN), key=lambda i: -scores.ffn[was, i])[:10])
        group = int(scores.heads[was].argmax())
        keys, queries = slice(group * HEAD, (group + 1) * HEAD), slice(group * QUERIES * HEAD, (group + 1) * QUERIES * HEAD)
        assert torch.equal(block.mlp.down_proj.weight, source.mlp.down_proj.weight[width][:, ffn])
        assert torch.equal(block.mlp.gate_proj.weight, source.mlp.gate_proj.weight[ffn][:, width])
        assert torch.equal(block.self_attn.q_proj.bias, source.self_attn.q_proj.bias[queries])
        assert torch.equal(block.self_attn.v_proj.weight, source.self_attn.v_proj.weight[keys][:, width])
        assert torch.equal(block.self_attn.o_proj.weight, source.self_attn.o_proj.weight[width][:, queries])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_dead_ranks_last(seed: int, name: str) -> None:
    model = built(name, seed)
    with torch.no_grad():
        no_block(model, all_alike())
        no_channels(model, dead := all_alike())
        for i, block in enumerate(model.model.layers):
            for weight in block.mlp.up_proj.parameters():
                weight[[i, 9]] = 0
            for weight in block.self_attn.v_proj.parameters():
                size = len(weight) // GROUPS
                weight[(i % 2) * size : (i % 2 + 1) * size] = 0
    found = importance(model, ids(seed, 4).split(2))
    assert found.blocks.argmin() == DEAD_BLOCK
    assert set(found.width.argsort()[:8].tolist()) == set(dead.width.argsort()[:8].tolist())
    assert all(set(row.argsort()[:2].tolist()) == {i, 9} for i, row in enumerate(found.ffn))
    assert found.heads.argmin(1).tolist() == [i % 2 for i in range(LAYERS)]
    for scores, count in ((found.blocks, 1), (found.width, 8), (found.ffn, 8), (found.heads, 4)):
        lowest = scores.flatten().sort().values
        assert lowest[count - 1] < 1e-12 < lowest[count]


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_that_of_the_whole_batch(seed: int, name: str) -> None:
    model = built(name, seed).double()
    rows = ids(seed, 7)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    parts = {"read": "self_attn.q_proj", "read2": "mlp.gate_proj", "ffn": "mlp.down_proj", "heads": "self_attn.o_proj"}
    for i, block in enumerate(model.model.layers):
        for part, module in parts.items():
            block.get_submodule(module).register_forward_pre_hook(
                lambda _, args, key=(part, i): seen.update({key: args[0].clone()})
            )
        block.register_forward_hook(
            lambda _, args, out, i=i: seen.update({("in", i): args[0].clone(), ("out", i): out.clone()})
        )
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    plain = {key: value.numpy() for key, value in seen.items()}
    blocks, ffn, heads, width = [], [], [], np.zeros(WIDTH)
    for i in range(LAYERS):
        before, after = plain["in", i], plain["out", i]
        size = (before**2).sum(-1) ** 0.5 * (after**2).sum(-1) ** 0.5
        blocks.append(1 - ((before * after).sum(-1) / size).mean())
        ffn.append((abs(plain["ffn", i]).mean(1) ** 2).sum(0) ** 0.5)
        by_head = plain["heads", i].reshape(7, 11, GROUPS, QUERIES, -1)
        heads.append((((by_head**2).sum(-1) ** 0.5).sum(-1).mean(1) ** 2).sum(0) ** 0.5)
        width = width + sum((abs(plain[part, i]).mean(1) ** 2).sum(0) ** 0.5 for part in ("read", "read2"))

    model.train()
    found = importance(model, rows.split([3, 1, 3]))
    assert model.training
    for scores, wanted in ((found.blocks, blocks), (found.width, width), (found.ffn, ffn), (found.heads, heads)):
        wanted = torch.stack([torch.as_tensor(row) for row in wanted])
        assert scores.dtype == torch.float64
        assert torch.allclose(scores, wanted, rtol=1e-9)
    assert len(found.energy) == sum("norm" in name and "self_attn" not in name for name, _ in model.named_parameters())
    for i in range(LAYERS):
        squares = plain["in", i] ** 2 + model.config.rms_norm_eps
        share = (squares / squares.sum(-1, keepdims=True)).mean((0, 1))
        assert torch.allclose(found.energy[f"model.layers.{i}.input_layernorm"], torch.as_tensor(share), rtol=1e-9)
    one_row = importance(model, [rows[:1]])
    assert not torch.allclose(one_row.ffn, found.ffn, rtol=1e-2), "the other rows count"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_dtype_and_mode_are_kept(seed: int, name: str) -> None:
    model = built(name, seed).bfloat16()
    made: Any = prune(model, pruned(hidden_size=16), importance(model, [ids(seed)]), "student")
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert not made.training
    assert made.config._attn_implementation == model.config._attn_implementation
    assert prune(model.train(), pruned(layers=1), importance(model, [ids(seed)]), "student").training


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (pruned(layers=5), r"student\.layers: 5 asked for, but LlamaForCausalLM has 4"),
        (pruned(layers=0), r"student\.layers: 0 asked for"),
        (pruned(hidden_size=33), r"student\.hidden_size: 33 asked for, but LlamaForCausalLM has 32"),
        (pruned(intermediate_size=-1), r"student\.intermediate_size: -1 asked for"),
        (pruned(kv_heads=3), r"student\.kv_heads: 3 asked for, but LlamaForCausalLM has 2"),
        (pruned(hidden_size=30), r"student: .*hidden size \(30\) is not a multiple"),
    ],
)
def test_bad_shapes_are_refused(seed: int, shape: PrunedStudent, message: str) -> None:
    model = built("llama", seed)
    with pytest.raises(SpecError, match=message):
        check_prunable(model, shape, "student")
    with pytest.raises(SpecError, match=message):
        prune(model, shape, all_alike(), "student")


MLA = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("mixtral", {**SMALL, "num_local_experts": 2}, "mlp.gate.weight"),
    "latent attention": ("deepseek_v3", {**SMALL, **MLA, "first_k_dense_replace": 9}, "q_a_proj"),
    "joint projections": ("phi3", {**SMALL, "pad_token_id": 0}, "qkv_proj"),
    "norm over all heads": ("olmo2", SMALL, r"q_norm.weight has the shape \(32,\)"),
    "mean taken off": ("cohere", {**SMALL, "pad_token_id": 0}, "norm is no RMSNorm"),
    "norm without weights": ("olmo", SMALL, "last norm has no weight"),
    "other names": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "wte"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_refused(name: str, tmp_path: Path) -> None:
    kind, values, message = OTHERS[name]
    AutoConfig.for_model(kind, vocab_size=VOCAB, **values).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=rf"^student: \w+ cannot be pruned: .*{message}") as caught:
        check_prunable(outline(tmp_path), pruned(layers=1), "student")
    assert caught.value.exit_code == 2


def test_an_outline_will_do(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3_text", vocab_size=VOCAB, **MODELS["gemma3"].config).save_pretrained(tmp_path)
    check_prunable(outline(tmp_path), pruned(layers=2, hidden_size=24), "student")
    with pytest.raises(SpecError, match=r"student\.layers: 9"):
        check_prunable(outline(tmp_path), pruned(layers=9), "student")
