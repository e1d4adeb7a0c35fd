"""Trainings of small mixtures of experts: through the engine with the experts spread over ranks, and in one float64 loop."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import DTYPES, build_model
from orchestrator.models.head import last_hidden
from orchestrator.models.writing import ModelWriter
from orchestrator.spec.model import Model
from orchestrator.spec.objective import Objective
from orchestrator.spec.train import Expert, Train
from orchestrator.store.local import LocalStore

VOCAB, SEQ, STEPS, ROWS = 64, 16, 5, 8
SEED = 3

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = WIDTHS | {"num_experts_per_tok": 2, "initializer_range": 0.1}
EXPERTS = {"intermediate_size": 48, "moe_intermediate_size": 24}
MODELS = {
    "mixtral": Model(type="mixtral", config=SMALL | {"intermediate_size": 48, "num_local_experts": 4}),
    "skewed": Model(type="mixtral", config=SMALL | {"intermediate_size": 48, "num_local_experts": 4}),
    "qwen3_moe": Model(
        type="qwen3_moe", config=SMALL | EXPERTS | {"num_experts": 4, "head_dim": 8, "tie_word_embeddings": True}
    ),
    "qwen2_moe": Model(type="qwen2_moe", config=SMALL | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40}),
    "deepseek_v3": Model(
        type="deepseek_v3",
        config=SMALL
        | EXPERTS
        | {"num_hidden_layers": 3, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 8}
        | {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
}
"""`skewed` sends every token to experts 0 and 1."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    model: str
    zero: int
    precision: str = "fp32"
    size: int = 2
    recomputed: bool = False
    """Whether activations are checkpointed."""

    @property
    def name(self) -> str:
        return f"{self.model}-zero{self.zero}-{self.precision}-over{self.size}{'-recomputed' * self.recomputed}"


CASES: dict[int, list[Case]] = {
    2: [
        Case("mixtral", 1),
        Case("mixtral", 3),
        Case("qwen3_moe", 2),
        Case("qwen2_moe", 1),
        Case("deepseek_v3", 1),
        Case("skewed", 1),
        Case("qwen3_moe", 1, recomputed=True),
        Case("mixtral", 2, "bf16"),
        Case("qwen3_moe", 1, "bf16"),
    ],
    4: [Case("mixtral", 1), Case("qwen3_moe", 2, size=4), Case("deepseek_v3", 3)],
}
RESUMED = [Case("mixtral", 1), Case("mixtral", 3), Case("deepseek_v3", 2, "bf16")]
"""On 2 ranks."""
CLIPPED_WRONGLY = Case("mixtral", 0)


def train_of(case: Case, world: int) -> Train:
    train = Train(
        steps=STEPS,
        global_batch=ROWS,
        micro_batch=2,
        learning_rate=2e-3,
        weight_decay=0.1,
        grad_clip=0.2,
        precision=case.precision,  # type: ignore[arg-type]
        workers=world,
        warmup_steps=2,
    )
    parallel = Expert.model_construct(kind="expert", size=case.size, stage=case.zero)  # a job file may not say stage 0
    return train.model_copy(update={"parallel": parallel})


def fresh(name: str) -> PreTrainedModel:
    model = build_model(MODELS[name], VOCAB, SEED, "student")
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)).roll(3))
        if name == "skewed":
            model.get_input_embeddings().weight[:, 0] = 8.0
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("mlp.gate.weight"):
                    parameter.zero_()[:, 0] = torch.tensor([1.0, 0.5, -1.0, -0.5])
    return model


def batch(step: int) -> torch.Tensor:
    """[rows, seq + 1]"""
    return torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(step))


def rate(step: int) -> float:
    return 2e-3 / (1 + step)


# The reference: one process, float64, every expert in it, torch's AdamW and clipping.


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    norms: list[float]
    weights: Weights


def reference(name: str) -> Trained:
    train = train_of(Case(name, 1), 1)
    model = fresh(name).double()
    model.set_experts_implementation("eager")
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=train.betas)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        ids = batch(step)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, norms, {name: value.detach() for name, value in model.state_dict().items()})


# What runs on every rank.


def trainings(root: Path) -> dict[str, Any]:
    from orchestrator.student.engine import join_group

    join_group()
    world, results = dist.get_world_size(), {}
    if world == 2:
        results["refused"] = refusals()
        results["stopgap"] = look_at_the_stopgap(world)
        results[CLIPPED_WRONGLY.name] = train_through(CLIPPED_WRONGLY, world, root)
        results |= {f"resumed {case.name}": train_resumed(case, world, root) for case in RESUMED}
    for case in CASES[world]:
        results[case.name] = train_through(case, world, root)
    return results


class Wrapped(nn.Module):
    """Like `Distiller`: calls the body of a model, not the model, and computes the loss itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = last_hidden(self.model, ids[:, :-1])
        logits = nn.functional.linear(hidden, self.model.get_output_embeddings().weight)  # type: ignore[union-attr]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def start(case: Case, world: int) -> Any:
    """An engine like that of `start_engine`, with the experts spread."""
    from orchestrator.student.engine import start_engine
    from orchestrator.student.experts import check_experts, experts_in_sight

    model, train = fresh(case.model), train_of(case, world)
    check_experts(model, case.size, "train")
    if case.recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Wrapped(model)
    with experts_in_sight(module, model):
        return start_engine(module, train)


def run_steps(engine: Any, first: int, last: int) -> tuple[list[float], list[float | None]]:
    """Losses and gradient norms of the steps; the batch is shared out among the ranks."""
    losses: list[float] = []
    norms: list[float | None] = []
    for step in range(first, last):
        for group in engine.optimizer.param_groups:
            group["lr"] = rate(step)
        mean = torch.zeros((), dtype=torch.float64)
        micros = batch(step).chunk(dist.get_world_size())[dist.get_rank()].split(2)
        for ids in micros:
            loss = engine(ids)
            engine.backward(loss)
            engine.step()
            mean += loss.detach() / (len(micros) * dist.get_world_size())
        dist.all_reduce(mean)
        norm = engine.get_global_grad_norm()
        losses.append(float(mean))
        norms.append(None if norm is None else float(norm))
    return losses, norms


def train_through(case: Case, world: int, root: Path) -> dict[str, Any]:
    """Train, save as `save_model` does, and keep what the spread model makes of a batch."""
    from orchestrator.student.experts import expert_tensors

    engine = start(case, world)
    losses, norms = run_steps(engine, 0, STEPS)
    model, dtype = engine.module.model, DTYPES[case.precision]
    state = dict(expert_tensors(model, dtype))
    with torch.no_grad():
        engine.eval()
        answer = last_hidden(model, batch(STEPS))
    if dist.get_rank() == 0:
        folder = root / str(world) / case.name
        folder.mkdir(parents=True)
        writer = ModelWriter(model, folder, dtype)
        for name, value in state.items():
            writer.add(name, value)
        writer.finish()
        torch.save(answer, folder / "answer.pt")
    engine.destroy()
    kept: list[int] = [0] * world
    dist.all_gather_object(kept, len(state))
    return {"losses": losses, "norms": norms, "elsewhere": sum(kept[1:])}


def train_resumed(case: Case, world: int, root: Path) -> dict[str, Any]:
    """Train three steps, start anew from the checkpoint, and compare the end with that of an unbroken training."""
    from orchestrator.student.checkpoint import restore_checkpoint, save_checkpoint
    from orchestrator.student.experts import expert_tensors

    store, schedule = LocalStore(root / "store"), ObjectiveSchedule(Objective(alpha=1.0), STEPS, torch.device("cpu"))
    folder = f"{world}/{case.name}"
    engine = start(case, world)
    run_steps(engine, 0, 3)
    save_checkpoint(engine, schedule, store, folder, 3)
    before = dict(expert_tensors(engine.module.model, torch.float32))
    losses, norms = run_steps(engine, 3, STEPS)
    through = dict(expert_tensors(engine.module.model, torch.float32))
    engine.destroy()
    engine = start(case, world)
    first = restore_checkpoint(engine, schedule, store, folder)
    same = run_steps(engine, first, STEPS) == (losses, norms)
    resumed = dict(expert_tensors(engine.module.model, torch.float32))
    engine.destroy()
    return {
        "first": first,
        "same losses": same,
        "same weights": equal(through, resumed),
        "same before": equal(before, resumed),
    }


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def look_at_the_stopgap(world: int) -> dict[str, Any]:
    """What DeepSpeed raises without it, and whether transformers' registry is what it was after DeepSpeed has run with it."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    import orchestrator.student.experts as experts

    case = Case("mixtral", 1)
    fresh(case.model)  # its classes enter the registry
    before = dict(_CAN_RECORD_REGISTRY)
    start(case, world).destroy()
    found: dict[str, Any] = {"registry": dict(_CAN_RECORD_REGISTRY) == before}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "recorders_by_name", nullcontext)
        try:
            start(case, world).destroy()
        except TypeError as error:
            found["without"] = str(error)
    return found


def refusals() -> dict[str, str]:
    from orchestrator.student.experts import check_experts
    from orchestrator.student.preflight import check_strategy

    jitter = MODELS["mixtral"].config | {"router_jitter_noise": 0.1}
    gelu = MODELS["mixtral"].config | {"hidden_act": "gelu"}
    dense = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    asked = {
        "dense": (Model(type="llama", config=dense), 2),
        "unknown routing": (Model(type="olmoe", config=SMALL | {"num_experts": 4, "pad_token_id": 1}), 2),
        "jitter": (Model(type="mixtral", config=jitter), 2),
        "activation": (Model(type="mixtral", config=gelu), 2),
        "three": (MODELS["mixtral"], 3),
        "all dense": (Model(type="qwen3_moe", config=MODELS["qwen3_moe"].config | {"mlp_only_layers": [0, 1]}), 2),
    }
    found = {}
    for name, (model, size) in asked.items():
        built = build_model(model, VOCAB, SEED, "student")
        try:
            check_strategy(built.config, train_of(Case("mixtral", 1), 2), "train")
            check_experts(built, size, "train")
        except SpecError as error:
            found[name] = str(error)
    return found
