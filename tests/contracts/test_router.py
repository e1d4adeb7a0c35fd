"""Routers in training: the auxiliary loss in the gradient and the counts are those of the formula, however a model is run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model
from orchestrator.models.router import RouterWatch, balance_loss, routers
from orchestrator.spec.model import Model

VOCAB, EXPERTS, PICKED, WEIGHT = 67, 8, 2, 0.3
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": PICKED,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "n_routed_experts": EXPERTS}
QWEN = {**SMALL, "num_experts": EXPERTS, "moe_intermediate_size": 16}
MODELS: dict[str, Model] = {
    "mixtral": Model(type="mixtral", config={**SMALL, "num_local_experts": EXPERTS}),
    "qwen3_moe": Model(type="qwen3_moe", config={**QWEN, "norm_topk_prob": True}),
    "qwen2_moe": Model(type="qwen2_moe", config={**QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 16}),
    "deepseek_v3": Model(type="deepseek_v3", config={**SMALL, **MLA, **GROUPS, "num_key_value_heads": 4}),
}
LAYERS = {name: 2 if name == "deepseek_v3" else 3 for name in MODELS}
"""MoE layers: the first layer of the DeepSeek model is dense."""


def built(name: str, seed: int) -> Any:
    """A model in training mode whose routers have clear preferences, and biases where they can."""
    model = build_model(MODELS[name], VOCAB, seed, "student").train()
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if "mlp.gate.weight" in key or "correction_bias" in key:
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(seed))


def task_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def explicit(model: Any, ids: torch.Tensor, sigmoid: bool) -> tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]:
    """Task loss, float64 auxiliary loss of each layer and counts of each layer, by loops over what the routers put out."""
    seen: list[Any] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = [gate.register_forward_hook(lambda _gate, _args, out: seen.append(out)) for gate in gates]
    loss = task_loss(model, ids)
    for handle in handles:
        handle.remove()
    losses, counts = [], []
    for logits, _weights, picked in seen:
        count = [int((picked == expert).sum()) for expert in range(EXPERTS)]
        scores = 1 / (1 + torch.exp(-logits.double())) if sigmoid else torch.exp(logits.double())
        affinity = scores / scores.sum(1, keepdim=True)
        total = torch.zeros((), dtype=torch.float64)
        for expert in range(EXPERTS):
            total = total + EXPERTS / (PICKED * len(picked)) * count[expert] * affinity[:, expert].mean()
        losses.append(total)
        counts.append(count)
    return loss, losses, counts


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5 * float(one[name].abs().max()) + 1e-9) for name in one
    )


@pytest.mark.parametrize("recompute", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_sum_of_both_losses(seed: int, name: str, recompute: str | None) -> None:
    watched, ids, scale = built(name, seed), [tokens(seed), tokens(seed + 1)], 0.5
    plain, task_only = copy.deepcopy(watched), copy.deepcopy(watched)
    if recompute:
        watched.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
    watch = RouterWatch(watched, WEIGHT, scale, LAYERS[name], "student.model")
    aux, load = torch.zeros(LAYERS[name], dtype=torch.float64), torch.zeros(LAYERS[name], EXPERTS, dtype=torch.int64)
    for micro in ids:
        (scale * task_loss(watched, micro)).backward()
        loss, losses, counts = explicit(plain, micro, name == "deepseek_v3")
        (scale * (loss + WEIGHT * torch.stack(losses).mean())).backward()
        (scale * task_loss(task_only, micro)).backward()
        aux += torch.stack(losses).detach() / len(ids)
        load += torch.tensor(counts)
    assert close(gradients(watched), gradients(plain))
    assert not close(gradients(watched), gradients(task_only)), "without the auxiliary loss it is another one"

    taken = watch.take()
    assert torch.allclose(taken.aux.double(), aux, rtol=1e-5)
    assert torch.equal(taken.load, load), "passes that recompute are not counted"
    assert taken.load.sum(1).tolist() == [2 * 3 * 11 * PICKED] * LAYERS[name]
    assert torch.allclose(taken.imbalance(), load.amax(1) / load.double().mean(1))
    again = watch.take()
    assert not again.load.any()
    assert not again.aux.any()


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_pipeline_add_the_gradient_of_the_whole(seed: int, name: str) -> None:
    whole = built(name, seed)
    parts = copy.deepcopy(whole)
    RouterWatch(whole, WEIGHT, 1.0, LAYERS[name], "student.model")
    for layers in (parts.model.layers[:2], parts.model.layers[2:]):
        RouterWatch(layers, WEIGHT, 1.0, LAYERS[name], "student.model")
    for model in (whole, parts):
        task_loss(model, tokens(seed)).backward()
    assert all(torch.equal(one, gradients(parts)[key]) for key, one in gradients(whole).items())


@pytest.mark.parametrize("name", MODELS)
def test_weight_0_and_evaluation_touch_nothing(seed: int, name: str) -> None:
    watched = built(name, seed)
    plain = copy.deepcopy(watched)
    watch = RouterWatch(watched, 0.0, 1.0, LAYERS[name], "student.model")
    for model in (watched, plain):
        task_loss(model, tokens(seed)).backward()
    assert all(torch.equal(one, gradients(plain)[key]) for key, one in gradients(watched).items())
    counted = watch.take()
    assert bool((counted.aux > 0).all())
    assert counted.load.sum() == LAYERS[name] * 33 * PICKED

    watch = RouterWatch(watched.eval(), WEIGHT, 1.0, LAYERS[name], "student.model")
    watched.zero_grad()
    plain.eval().zero_grad()
    for model in (watched, plain):
        task_loss(model, tokens(seed)).backward()
    assert all(torch.equal(one, gradients(plain)[key]) for key, one in gradients(watched).items())
    assert not watch.take().load.any()


def test_the_routers_of_a_model_are_found_and_a_dense_one_has_none(seed: int) -> None:
    for name in MODELS:
        first = 3 - LAYERS[name]
        assert list(routers(built(name, seed))) == [f"model.layers.{index}.mlp.gate" for index in range(first, 3)]
    dense = build_model(Model(type="qwen3", config={k: v for k, v in SMALL.items() if "experts" not in k}), VOCAB, seed, "s")
    assert routers(dense) == {}
    watch = RouterWatch(dense, WEIGHT, 1.0, 1, "student.model")
    task_loss(dense, tokens(seed)).backward()
    assert watch.take().load.shape[0] == 0


@pytest.mark.parametrize("picked", [1, 2, 4])
def test_the_loss_of_balance_is_1_and_of_collapse_experts_over_k(picked: int) -> None:
    every = torch.arange(EXPERTS).reshape(-1, picked)
    uniform = torch.full((len(every), EXPERTS), 0.3)
    assert float(balance_loss(uniform, every)) == pytest.approx(1)
    first = torch.arange(picked).repeat(5, 1)
    collapsed = torch.zeros(5, EXPERTS)
    collapsed[:, :picked] = 0.7
    assert float(balance_loss(collapsed, first)) == pytest.approx(EXPERTS / picked)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_the_bias_balances_a_skewed_router_without_a_loss(seed: int, rate: float) -> None:
    model = built("deepseek_v3", seed)
    for router in routers(model).values():
        bias: Any = router.e_score_correction_bias
        bias.copy_(torch.linspace(0, 1, EXPERTS))
    watch = RouterWatch(model, 0.0, 1.0, 2, "student.model")
    assert watch.biased
    history = []
    for step in range(60):
        task_loss(model, tokens(seed + step % 3))
        routing = watch.take()
        history.append(routing.imbalance())
        watch.update_bias(rate, routing.load)
    early, late = torch.stack(history[:3]).mean(0), torch.stack(history[-6:]).mean(0)
    if rate:
        assert bool((late < 0.75 * early).all())
    else:
        assert torch.equal(torch.stack(history[:3]), torch.stack(history[-3:])), "without a rate it stays skewed"


def test_one_step_of_the_bias(seed: int) -> None:
    model = built("deepseek_v3", seed).to(torch.bfloat16)
    gates = list(routers(model).values())
    before = [gate.get_buffer("e_score_correction_bias").double() for gate in gates]
    watch = RouterWatch(model, 0.0, 1.0, 2, "student.model")
    load = torch.tensor([[9, 0, 4, 4, 5, 2, 4, 4], [4] * EXPERTS])
    for _ in range(3):
        watch.update_bias(1e-3, load)
    moved = [gate.get_buffer("e_score_correction_bias") for gate in gates]
    assert {bias.dtype for bias in moved} == {torch.float32}, "bf16 would round the steps away"
    expected = 3e-3 * torch.tensor([-1, 1, 0, 0, -1, 1, 0, 0]).double()
    assert torch.allclose(moved[0].double() - before[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(moved[1].double(), before[1]), "a balanced layer stays as it is"
    assert not RouterWatch(built("mixtral", seed), 0.0, 1.0, 3, "student.model").biased


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_model_is_read_as_the_same_scores(seed: int, name: str) -> None:
    models = [built(name, seed), built(name, seed).to(torch.bfloat16)]
    watches = [RouterWatch(model, WEIGHT, 1.0, LAYERS[name], "student.model") for model in models]
    for model in models:
        task_loss(model, tokens(seed)).backward()
    one, other = (watch.take() for watch in watches)
    assert torch.allclose(one.aux, other.aux, rtol=0.05)
    scores = {score for watch in watches for score in watch._score.values()}
    assert scores == {"sigmoid" if name == "deepseek_v3" else "softmax"}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_router_of_autoep_is_read_the_same_way(seed: int, score: str) -> None:
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    torch.manual_seed(seed)
    router = TokenChoiceTopKRouter(16, EXPERTS, None, None, PICKED, score, True, 2.5, False)
    plain, x, mix = copy.deepcopy(router), torch.randn(33, 16), torch.randn(33, PICKED)
    watch = RouterWatch(nn.ModuleList([router]), WEIGHT, 1.0, 1, "student.model")
    weights, picked, _counts = router(x)
    (weights * mix).sum().backward()

    logits = x @ plain.gate.weight.T
    own_weights, own_picked, counts = plain(x)
    assert torch.equal(picked, own_picked)
    scores = torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, -1)
    means = (scores / scores.sum(1, keepdim=True)).mean(0)
    aux = EXPERTS / PICKED * (torch.bincount(own_picked.flatten(), minlength=EXPERTS) / 33 * means).sum()
    ((own_weights * mix).sum() + WEIGHT * aux).backward()
    assert close(gradients(router), gradients(plain))
    taken = watch.take()
    assert torch.equal(taken.load[0], counts.long())
    assert float(taken.aux[0]) == pytest.approx(float(aux.detach()), rel=1e-5)


class OddRouter(nn.Module):
    """Scores by the root of softplus; or puts out nothing but ids."""

    def __init__(self, seed: int, bare: bool) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.bare = EXPERTS, PICKED, bare
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: torch.Tensor) -> Any:
        logits = x @ self.weight.T
        weights, picked = nn.functional.softplus(logits).sqrt().topk(PICKED)
        return picked if self.bare else (logits, weights, picked)


@pytest.mark.parametrize(("bare", "complaint"), [(True, "does not put out logits, weights"), (False, "neither softmax nor")])
def test_a_router_that_cannot_be_read_is_refused(seed: int, bare: bool, complaint: str) -> None:
    router = OddRouter(seed, bare)
    RouterWatch(nn.ModuleList([router]), WEIGHT, 1.0, 1, "student.model")
    with pytest.raises(SpecError, match=rf"^student\.model: OddRouter .*{complaint}"):
        router(torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)))
