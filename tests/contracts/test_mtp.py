"""Multi-token prediction: the formula, what each position may see, which label is whose, and decoding with its drafts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers.modeling_layers import MtpLayer

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model, load_model
from orchestrator.models.head import last_hidden
from orchestrator.models.mtp import MultiTokenPrediction, load_mtp, save_mtp, shifted
from orchestrator.models.speculate import acceptance, generate
from orchestrator.spec.model import Model

Tensor = torch.Tensor
VOCAB, ROWS, SEQ = 67, 2, 11
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 3, "initializer_range": 0.2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
MODELS: dict[str, Model] = {
    "llama": Model(type="llama", config={**SMALL, "initializer_range": 0.2}),
    "gemma3-sliding": Model(type="gemma3_text", config={**GEMMA, "layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3-full": Model(type="gemma3_text", config={**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": Model(type="mixtral", config={**SMALL, "num_local_experts": 4, "initializer_range": 0.2}),
    "deepseek_v3": Model(
        type="deepseek_v3",
        config={**SMALL, **MLA, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1, "initializer_range": 0.2},
    ),
}


def built(name: str, seed: int, depth: int = 2) -> tuple[Any, Any]:
    """A model and its modules; norms are as if trained, so that leaving one out shows."""
    model = build_model(MODELS[name], VOCAB, seed, "student").eval()
    mtp = MultiTokenPrediction(model, depth, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in [*model.parameters(), *mtp.parameters()]:
        if parameter.dim() == 1:
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=generator)
    return model, mtp


def text(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randint(VOCAB, (rows, SEQ + 1), generator=torch.Generator().manual_seed(seed))


# The formula.


def rms(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `x` [heads, n, size] at positions 0 to n - 1, halves paired."""
    _, n, size = x.shape
    angles = torch.arange(n).double()[:, None] * theta ** (-torch.arange(0, size, 2).double() / size)
    left, right = x.chunk(2, -1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1)


def llama_block(x: Tensor, block: Any, theta: float) -> Tensor:
    """One row [n, width] through a Llama block."""
    attention, mlp, n = block.self_attn, block.mlp, len(x)
    normed = rms(x, block.input_layernorm)
    queries, keys, values = (
        linear(normed, p.weight.double()).view(n, -1, 8).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    keys, values = (x.repeat_interleave(2, 0) for x in (rotated(keys, theta), values))
    scores = rotated(queries, theta) @ keys.transpose(1, 2) / 8**0.5
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    x = x + linear((scores.softmax(-1) @ values).transpose(0, 1).reshape(n, -1), attention.o_proj.weight.double())
    normed = rms(x, block.post_attention_layernorm)
    gated = silu(linear(normed, mlp.gate_proj.weight.double())) * linear(normed, mlp.up_proj.weight.double())
    return x + linear(gated, mlp.down_proj.weight.double())


def test_llama_against_the_formula_in_float64(seed: int) -> None:
    model, mtp = built("llama", seed)
    theta = model.config.rope_parameters["rope_theta"]
    table, ids = model.model.embed_tokens.weight.double(), text(seed)
    with torch.no_grad():
        hidden = last_hidden(model, ids[:, :-1])
        states = mtp(hidden, ids)
        for row in range(ROWS):
            previous = hidden[row].double()
            for k, step in enumerate(mtp.steps, start=1):
                joined = [
                    torch.cat([rms(previous[i], step.hidden_norm), rms(table[ids[row, i + k]], step.embedding_norm)])
                    for i in range(SEQ - k)
                ]
                mixed = torch.stack(joined) @ step.projection.weight.double().T
                previous = rms(llama_block(mixed, step.block, theta), step.norm)
                assert states[k - 1].shape == (ROWS, SEQ - k, 32)
                assert torch.allclose(states[k - 1][row].double(), previous, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(states[k - 1][row].double(), previous.roll(1, 0), rtol=1e-1, atol=1e-1)


def reference_layer(model: Any, step: Any) -> Any:
    """The same step as transformers' layer for DeepSeek's weights, which joins token and state in the other order."""
    decoder = model.model
    layer = MtpLayer(model.config, type(decoder.layers[-1]), type(decoder.norm), len(decoder.layers) - 1).eval()
    token, state = step.projection.weight.chunk(2, 1)[::-1]
    own = {"enorm": step.embedding_norm, "hnorm": step.hidden_norm, "post_norm": step.norm, "mtp_block": step.block}
    weights = {f"{name}.{key}": value for name, module in own.items() for key, value in module.state_dict().items()}
    layer.load_state_dict({**weights, "eh_proj.weight": torch.cat([token, state], 1)})
    return layer


def reference_run(model: Any, layer: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The layer with a mask and positions made here."""
    n, config = tokens.shape[1], model.config
    kind = (getattr(config, "layer_types", None) or [None])[-1]
    positions = torch.arange(n)[None]
    back = positions.T - positions
    seen = (back >= 0) & ((back < config.sliding_window) if kind == "sliding_attention" else True)
    mask = torch.zeros(n, n).masked_fill(~seen, -torch.inf)[None, None].expand(len(tokens), 1, n, n)
    rotary = model.model.rotary_emb(hidden, positions, *([kind] if "gemma3" in config.model_type else []))
    return layer(model.model.embed_tokens(tokens), hidden, rotary, mask, positions, None)


@pytest.mark.parametrize("name", MODELS)
def test_against_the_layer_of_transformers(seed: int, name: str) -> None:
    model, mtp = built(name, seed)
    ids = text(seed)
    with torch.no_grad():
        hidden = last_hidden(model, ids[:, :-1])
        for k, states in enumerate(mtp(hidden, ids), start=1):
            layer = reference_layer(model, mtp.steps[k - 1])
            ahead = ids[:, k:SEQ]
            expected = reference_run(model, layer, hidden[:, : SEQ - k], ahead)
            assert torch.allclose(states, expected, rtol=1e-4, atol=1e-5)
            other = reference_run(model, layer, hidden[:, : SEQ - k], ids[:, k - 1 : SEQ - 1])
            assert not torch.allclose(states, other, rtol=1e-1, atol=1e-1)
            hidden = expected


def test_a_block_is_of_the_kind_of_the_last_one(seed: int) -> None:
    model, mtp = built("deepseek_v3", seed)
    first, last = (type(layer.mlp) for layer in model.model.layers)
    assert first is not last and all(type(step.block.mlp) is last for step in mtp.steps)


# What a position sees.


@pytest.mark.parametrize("name", MODELS)
def test_a_state_sees_its_own_next_token_and_none_after_it(seed: int, name: str) -> None:
    model, mtp = built(name, seed)
    ids = text(seed, rows=1)

    def states(ids: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return mtp(last_hidden(model, ids[:, :-1]), ids)

    before = states(ids)
    for changed in range(2, SEQ + 1):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB
        for k, (old, new) in enumerate(zip(before, states(other), strict=True), start=1):
            first = changed - k  # h^k_i has seen the token at i + k
            assert torch.allclose(old[:, :first], new[:, :first], rtol=1e-5, atol=1e-5)
            if first < SEQ - k:
                assert not torch.allclose(old[:, first], new[:, first], rtol=1e-2, atol=1e-2)


def test_gradients_reach_the_model_and_what_is_shared(seed: int) -> None:
    model, mtp = built("llama", seed)
    ids = text(seed)
    hidden = last_hidden(model, ids[:, :-1])
    weights = torch.randn(32, generator=torch.Generator().manual_seed(seed))  # a plain sum over a norm's output may not move
    (mtp(hidden.detach(), ids)[1] @ weights).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    looked_up = set(ids[:, 1 : SEQ - 1].flatten().tolist()) | set(ids[:, 2:SEQ].flatten().tolist())
    assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == looked_up
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in mtp.named_parameters() if not n.startswith("steps.0.norm")
    )
    assert all(p.grad is None for p in model.model.layers.parameters())
    (mtp(hidden, ids)[1] @ weights).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.model.layers.parameters())


def test_nothing_of_the_model_is_owned(seed: int) -> None:
    model, mtp = built("llama", seed)
    assert not {id(p) for p in mtp.parameters()} & {id(p) for p in model.parameters()}
    block = sum(p.numel() for p in model.model.layers[-1].parameters())
    assert sum(p.numel() for p in mtp.parameters()) == 2 * (block + 2 * 32 * 32 + 3 * 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = text(seed)
    logits = model(input_ids=ids, use_cache=False).logits
    mtp(last_hidden(model, ids[:, :-1]), ids)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    frozen = MultiTokenPrediction(model.requires_grad_(False), 1, seed)
    assert all(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3-full", "deepseek_v3"])
def test_the_start_depends_on_the_seed_alone(seed: int, name: str) -> None:
    model, _ = built(name, seed)  # with norms that are not at their start
    state = torch.get_rng_state()
    first: Any = MultiTokenPrediction(model, 2, seed)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(seed + 1)
    second, other = (MultiTokenPrediction(model, depth, s) for depth, s in ((3, seed), (2, seed + 1)))
    weights = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in weights.items()), "more depth changes no other"
    matrices = [key for key, value in weights.items() if value.dim() > 1]
    assert matrices and not any(torch.allclose(weights[key], other.state_dict()[key], atol=1e-3) for key in matrices)
    norms = [value for key, value in weights.items() if value.dim() == 1]
    start = 0.0 if "gemma3" in name else 1.0
    assert all(bool((value == start).all()) for value in norms if len(value) == 32)
    assert abs(float(first.steps[0].projection.weight.detach().std()) - 0.2) < 0.02, "the model's own initializer_range"


def test_a_model_of_another_build_is_refused() -> None:
    model = build_model(Model(type="gpt2", config={"n_embd": 32, "n_layer": 1, "n_head": 4}), VOCAB, 0, "student")
    with pytest.raises(SpecError, match=r"GPT2LMHeadModel is no decoder whose blocks can be told apart"):
        MultiTokenPrediction(model, 1, 0)


# Which label is whose, and decoding.


CYCLE, LONG = 13, 20


def cycle(seed: int, rows: int, length: int) -> Tensor:
    """Rows of a language in which each of its tokens has one successor, beginning with one after another."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:CYCLE]
    return order[(torch.arange(rows)[:, None] + torch.arange(length)) % CYCLE]


@cache
def trained(seed: int, late: int = 0) -> tuple[Any, Any]:
    """A model and two modules that learned the cycle from soft labels, those of the modules `late` positions off."""
    model, mtp = built("llama", seed)
    ids = cycle(seed, CYCLE, LONG + 1)
    labels = torch.nn.functional.one_hot(ids[:, 1:], VOCAB).float()  # at t: of ids[t + 1] given ids[: t + 1]
    optimizer = torch.optim.Adam([*model.parameters(), *mtp.parameters()], lr=5e-3)
    for _ in range(40):
        hidden = last_hidden(model, ids[:, :-1])
        loss = -(labels * model.lm_head(hidden).log_softmax(-1)).sum(-1).mean()
        for depth, states in enumerate(mtp(hidden, ids), start=1):
            target = labels[:, shifted(depth, LONG)][:, late:]
            log_probs = model.lm_head(states).log_softmax(-1)
            loss = loss - (target * log_probs[:, : LONG - depth - late]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, mtp


def test_labels_are_shifted_by_the_depth(seed: int) -> None:
    ids = text(seed)
    for depth in range(4):
        assert torch.equal(ids[:, 1:][:, shifted(depth, SEQ)], ids[:, depth + 1 :])
    learned = cycle(seed, CYCLE, LONG + 1)
    right, late = acceptance(*trained(seed), learned), acceptance(*trained(seed, late=1), learned)
    print(right, late)
    assert right.positions == CYCLE * (LONG - 2)
    assert min(right.rates) > 0.95 and right.tokens_per_forward > 2.9
    assert max(late.rates) < 0.05


def noisy(mtp: Any, model: Any, seed: int, noise: float) -> Any:
    """Modules whose drafts hold the less often, the more noise."""
    other: Any = MultiTokenPrediction(model, mtp.depth, 0).eval()
    other.load_state_dict(mtp.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for step in other.steps:
        step.projection.weight.data += noise * torch.randn(step.projection.weight.shape, generator=generator)
    return other


@torch.no_grad()
def greedy(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    for _ in range(new_tokens):
        prompt = torch.cat([prompt, model(input_ids=prompt[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return prompt


@torch.no_grad()
def plain_chains(model: Any, mtp: Any, ids: Tensor) -> Tensor:
    """[rows, positions]: how many drafts hold at each position, position by position on all logits."""
    own = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
    drafts = [model.lm_head(h).argmax(-1) for h in mtp(last_hidden(model, ids[:, :-1]), ids)]
    chains = torch.zeros(len(ids), own.shape[1] - mtp.depth, dtype=torch.long)
    for row, position in torch.cartesian_prod(*(torch.arange(n) for n in chains.shape)).tolist():
        for k, draft in enumerate(drafts, start=1):
            if draft[row, position] != own[row, position + k]:
                break
            chains[row, position] += 1
    return chains


@pytest.mark.parametrize("noise", [0.0, 0.3, 10.0])
def test_acceptance_against_a_plain_count(seed: int, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.models.speculate.head_rows", lambda *_: 7)  # chunks that end inside of rows
    model, mtp = trained(seed)
    mtp = noisy(mtp, model, seed, noise)
    ids = cycle(seed, 6, LONG + 1)
    ids[3:] = torch.randint(VOCAB, (3, LONG + 1), generator=torch.Generator().manual_seed(seed))
    chains, measured = plain_chains(model, mtp, ids), acceptance(model, mtp, ids)
    assert measured.positions == chains.numel()
    assert measured.rates == pytest.approx([float((chains >= k).double().mean()) for k in (1, 2)])
    assert measured.tokens_per_forward == pytest.approx(1 + float(chains.double().mean()))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 0.3, 10.0])
def test_speculative_decoding_is_greedy_decoding(seed: int, noise: float) -> None:
    """Same tokens, and as many forwards as the drafts that hold on them save."""
    model, mtp = trained(seed)
    mtp, new_tokens = noisy(mtp, model, seed, noise), 30
    for prompt, learned in ((cycle(seed, 1, 4)[0], True), (text(seed)[0, :5], False)):
        plain = greedy(model, prompt, new_tokens + 4)
        ids, forwards = generate(model, mtp, prompt, new_tokens)
        assert torch.equal(ids, plain[: len(prompt) + new_tokens])
        chains = plain_chains(model, mtp, plain[None])[0]
        made, expected = 1, 1  # the first forward has no drafts to check
        while made < new_tokens:
            made += int(chains[len(prompt) + made - 2]) + 1
            expected += 1
        assert forwards == expected
        print(noise, new_tokens / forwards)
        assert not learned or noise or forwards <= 15
        assert not learned or noise < 10 or forwards >= 20


# On disk.


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_saved_beside_the_model_and_loaded(seed: int, name: str, tmp_path: Path) -> None:
    model, mtp = built(name, seed)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "fp32", torch.device("cpu"))
    assert load_mtp(loaded, tmp_path) is None
    save_mtp(mtp.state_dict(), mtp.depth, tmp_path)
    loaded = load_model(tmp_path, "fp32", torch.device("cpu"))
    again = load_mtp(loaded, tmp_path)
    assert again is not None and again.depth == 2 and not again.training
    ids = text(seed)
    with torch.no_grad():
        first = mtp(last_hidden(model, ids[:, :-1]), ids)
        second = again(last_hidden(loaded, ids[:, :-1]), ids)
    assert all(torch.equal(old, new) for old, new in zip(first, second, strict=True))
    own = sum(p.numel() for p in mtp.parameters()) * 4
    assert own <= (tmp_path / "mtp" / "weights.safetensors").stat().st_size < own + 8192, "nothing of the model is stored"
    narrow = load_mtp(load_model(tmp_path, "bf16", torch.device("cpu")), tmp_path)
    assert narrow is not None and {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
