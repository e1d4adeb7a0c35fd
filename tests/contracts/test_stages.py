"""A decoder in pieces does what the whole one does, for the architectures of the field, and learns the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model
from orchestrator.models.head import last_hidden
from orchestrator.models.stages import check_pieces, pieces
from orchestrator.spec.model import Model

VOCAB = 67
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
SLIDING = ["sliding_attention", "full_attention"] * 2
MODELS: dict[str, Model] = {
    "llama": Model(type="llama", config={**SMALL, "tie_word_embeddings": True}),
    "qwen3": Model(type="qwen3", config={**SMALL, "head_dim": 8}),
    "gemma3": Model(type="gemma3_text", config={**SMALL, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING}),
    "mixtral": Model(type="mixtral", config={**SMALL, "num_local_experts": 4}),
    "qwen3-moe": Model(
        type="qwen3_moe",
        config={**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "deepseek-v3": Model(
        type="deepseek_v3",
        config={**SMALL, **LATENT, **GROUPS, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_pieces_make_what_the_whole_makes(seed: int, name: str) -> None:
    model: Any = build_model(MODELS[name], VOCAB, seed, "student")
    ids = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    whole = last_hidden(model, ids)
    whole.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    cut = pieces(model)
    hidden = cut.embedding(ids)
    for block in cut.blocks:
        hidden = block(hidden)
    hidden = cut.final(hidden)
    assert torch.equal(hidden, whole)
    hidden.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)

    swapped = cut.embedding(ids)
    for block in [*cut.blocks[1:], cut.blocks[0]]:
        swapped = block(swapped)
    assert not torch.allclose(cut.final(swapped), whole, atol=1e-3), "the order of blocks matters"


def test_a_model_whose_pieces_do_something_else_is_refused(seed: int) -> None:
    for spec in MODELS.values():
        check_pieces(build_model(spec, VOCAB, seed, "student"), "student")
    granite = build_model(Model(type="granite", config={**SMALL, "embedding_multiplier": 12.0}), VOCAB, seed, "student")
    with pytest.raises(SpecError, match="student: GraniteForCausalLM does more than to pass on hidden states"):
        check_pieces(granite, "student")
    phi = build_model(Model(type="phi", config={k: v for k, v in SMALL.items() if k != "num_key_value_heads"}), VOCAB, 0, "x")
    with pytest.raises(SpecError, match="PhiForCausalLM is no decoder whose last norm can be told apart"):
        check_pieces(phi, "student")


def test_the_pieces_own_every_parameter_once(seed: int) -> None:
    for name, spec in MODELS.items():
        model = build_model(spec, VOCAB, seed, "student")
        cut = pieces(model)
        own = [p for piece in (cut.embedding, *cut.blocks, cut.final) for p in piece.parameters()]
        assert {id(p) for p in own} == {id(p) for p in model.parameters()}, name
        assert len(own) == len({id(p) for p in own}), name
