"""The head taken out of a model makes the logits that the model itself makes, for the architectures of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model
from orchestrator.models.head import check_head, last_hidden, load_head, output_head
from orchestrator.spec.model import Model

VOCAB = 67
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Model] = {
    "llama": Model(type="llama", config=SMALL),
    "llama-tied": Model(type="llama", config={**SMALL, "tie_word_embeddings": True}),
    "qwen3": Model(type="qwen3", config={**SMALL, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2-softcap": Model(type="gemma2", config={**SMALL, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "gemma3": Model(type="gemma3_text", config={**SMALL, "head_dim": 8}),
    "cohere-scale": Model(type="cohere", config={**SMALL, "logit_scale": 0.0625, "pad_token_id": 0}),
    "granite-scale": Model(type="granite", config={**SMALL, "logits_scaling": 8.0}),
    "phi-bias": Model(type="phi", config={k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "mixtral-experts": Model(type="mixtral", config={**SMALL, "num_local_experts": 4}),
}


def built(model: Model, seed: int) -> Any:
    made = build_model(model, VOCAB, seed, "student").eval()
    bias = getattr(made.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_the_head_makes_the_logits_of_the_model(seed: int, name: str, tmp_path: Path) -> None:
    model = built(MODELS[name], seed)
    ids = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        hidden = last_hidden(model, ids)
        assert torch.allclose(output_head(model)(hidden), own, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(output_head(model)(hidden.roll(1, 1)), own, rtol=1e-3, atol=1e-4)
    check_head(model, "student")

    model.save_pretrained(tmp_path)
    loaded = load_head(tmp_path, torch.float32, torch.device("cpu"))
    assert torch.equal(loaded(hidden), output_head(model)(hidden)), "read alone from the folder, it is the same head"


def test_dropout_is_no_other_way(seed: int) -> None:
    model = build_model(Model(type="llama", config={**SMALL, "attention_dropout": 0.3}), VOCAB, seed, "student")
    assert model.training
    check_head(model, "student")
    assert model.training


def test_logits_made_in_another_way_are_refused(seed: int) -> None:
    model = built(MODELS["llama"], seed)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 2)
    with pytest.raises(SpecError, match=r"student\.model: LlamaForCausalLM makes its logits in a way") as caught:
        check_head(model, "student.model")
    assert caught.value.exit_code == 2
