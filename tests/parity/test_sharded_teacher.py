"""A teacher spread over 2 and over 4 processes says what it says in one: held to transformers itself, whole, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from orchestrator.errors import SpecError
from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import label_kind
from orchestrator.labels.layout import Frame
from orchestrator.models.build import build_model, model_config
from orchestrator.models.sharded import check_shards
from orchestrator.spec.labels import SampledLabels
from orchestrator.spec.model import Model
from orchestrator.teacher.backend import Replica, TransformersBackend
from tests.parity.ranks import run_on_ranks

VOCAB, ROWS, SEQ = 67, 3, 11
"""A vocabulary that no number of shards divides."""
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, Model] = {
    "llama": Model(type="llama", config={**SMALL, "num_key_value_heads": 4}),
    "qwen3-tied": Model(type="qwen3", config={**SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma2-softcap": Model(type="gemma2", config={**SMALL, "num_key_value_heads": 2, "final_logit_softcapping": 0.5}),
    "gemma3-one-key-head": Model(type="gemma3_text", config={**SMALL, "num_key_value_heads": 1}),
    "cohere-scale": Model(type="cohere", config={**SMALL, "num_key_value_heads": 2, "logit_scale": 0.0625, "pad_token_id": 0}),
    "qwen3-experts": Model(type="qwen3_moe", config={**SMALL, **EXPERTS, "num_key_value_heads": 2}),
    "mixtral-experts": Model(
        type="mixtral", config={**SMALL, "num_local_experts": 4, "intermediate_size": 64, "num_key_value_heads": 4}
    ),
}
FEATURES = ("hidden.1", "ffn.2")
BOUND = 1e-5


def ids_of(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(seed))


def whole(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities and `FEATURES`, as transformers makes them in one process."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}
    model.model.layers[1].mlp.register_forward_hook(
        lambda _m, _a, out: found.update({"ffn.2": out[0] if isinstance(out, tuple) else out})
    )
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    return out.logits.log_softmax(-1), found | {"hidden.1": out.hidden_states[1]}


def spread(folders: dict[str, str], ids: list[list[int]], answers: str) -> dict[str, float]:
    """Have the models of `folders` say something about `ids`, into files; the largest part of the weights on any shard."""
    shares: dict[str, float] = {}
    for name, folder in folders.items():
        teacher = TransformersBackend(Replica(folder, "fp32", FEATURES, dist.get_world_size()))
        answer = teacher.answer(torch.tensor(ids))
        logits = torch.cat(list(answer.logits())).unflatten(0, (len(ids), -1))
        weights = dict(teacher.model.named_parameters()).values()
        local = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
        most = torch.tensor(local)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        shares[name] = int(most) / sum(w.numel() for w in weights)
        if dist.get_rank() == 0:
            said = {"log_probs": logits.log_softmax(-1), **answer.features}
            torch.save({key: value.clone() for key, value in said.items()}, Path(answers) / f"{name}.pt")
    return shares


@pytest.mark.parametrize("shards", [pytest.param(2, marks=pytest.mark.slice), 4])
def test_a_sharded_teacher_says_the_same(seed: int, shards: int, tmp_path: Path) -> None:
    ids = ids_of(seed)
    for name, model in MODELS.items():
        build_model(model, VOCAB, seed, "teacher").save_pretrained(tmp_path / name)
    shares = run_on_ranks(
        shards, tmp_path, spread, {name: str(tmp_path / name) for name in MODELS}, ids.tolist(), str(tmp_path)
    )
    kind = label_kind(SampledLabels(samples=20), Frame(VOCAB, SEQ))
    for name in MODELS:
        said = torch.load(tmp_path / f"{name}.pt")
        log_probs, features = whole(tmp_path / name, ids)
        apart = float((said["log_probs"] - log_probs).abs().max())
        assert apart < BOUND, name
        assert not torch.allclose(said["log_probs"], log_probs.roll(1, 1), atol=1e-3), "the bound can be failed"
        for feature, values in features.items():
            assert torch.allclose(said[feature], values, rtol=1e-4, atol=1e-5), (name, feature)
        drawn = [kind.extract(Answer.of_logits(p), [bytes(16)] * ROWS)["ids@1"] for p in (said["log_probs"], log_probs)]
        moved = np.mean(drawn[0] != drawn[1])
        assert moved < 0.01, name
        # A process holds its part, all norms and routers, and where key heads are fewer than shards all of those.
        assert shares[name] < 1 / shards + 0.11, name
        print(f"{name} over {shards}: {apart:.1e} nats apart, {moved:.2%} of draws moved, {shares[name]:.2f} of the weights")


REFUSED: dict[str, tuple[Model, int, str]] = {
    "no plan": (Model(type="gpt2", config={}), 2, "no tensor-parallel plan for GPT2LMHeadModel"),
    "heads": (MODELS["llama"], 3, "3 do not divide the 4 attention heads"),
    "key heads": (Model(type="qwen3", config={**SMALL, "num_attention_heads": 12, "num_key_value_heads": 4}), 6, "4 key heads"),
    "experts": (
        Model(type="qwen3_moe", config={**SMALL, **EXPERTS, "num_key_value_heads": 4, "moe_intermediate_size": 24}),
        2,
        "cannot share 24 channels of each expert",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_spread_is_refused(case: str) -> None:
    model, shards, words = REFUSED[case]
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(model_config(model, VOCAB, "teacher"))
    with pytest.raises(SpecError, match=words) as caught:
        check_shards(outline, shards)
    assert caught.value.exit_code == 2 and "teacher.shards" in str(caught.value)
