"""Training on 1, 2 and 4 ranks under every strategy against one plain loop in float64, whole and resumed.

All trainings of a world size run in one group of processes, started once; the tests look at what they left behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.models.build import build_model
from tests.parity.course import (
    LOSSES,
    MODELS,
    SEED,
    STEPS,
    VOCAB,
    WEIGHTS,
    Bench,
    Case,
    Weights,
    build_bench,
    course,
    dense_loss,
    detour,
    deviation,
    interrupted,
    reference,
    run_steps,
)
from tests.parity.ranks import run_on_ranks

CASES: dict[int, list[Case]] = {
    1: [
        Case("sampled", 0),
        Case("topk", 3, model="untied"),
        Case("hard", 1),
        Case("shifted", 1),
        Case("taid", 1),
        Case("sampled", 2, "bf16"),
    ],
    2: [
        *(Case("sampled", zero) for zero in range(4)),
        *(Case("topk", zero, model="untied") for zero in range(4)),
        *(Case("sampled", zero, "bf16") for zero in (1, 2, 3)),
        Case("taid", 3),
        *(Case("relations", zero) for zero in (1, 3)),
        Case("sampled", 2, strategy="offload"),
        Case("sampled", 3, "bf16", strategy="offload"),
        Case("sampled", 1, strategy="1f1b", model="deep"),
        Case("topk", 1, strategy="1f1b", model="deep-untied"),
        Case("sampled", 1, "bf16", strategy="1f1b", model="deep"),
        Case("topk", 1, "bf16", strategy="1f1b", model="deep-untied"),
        Case("sampled", 1, strategy="dualpipev", model="deep"),
        Case("topk", 1, strategy="dualpipev", model="deep-untied"),
        Case("sampled", 1, "bf16", strategy="dualpipev", model="deep"),
        Case("shifted", 1, strategy="1f1b", model="deep"),
        Case("sampled", 1, strategy="1f1b", model="experts"),
        Case("sampled", 1, model="experts"),
        *(Case("sampled", zero, strategy="ep2", model="experts") for zero in (1, 2)),
        *(Case("sampled", zero, "bf16", strategy="ep2", model="experts") for zero in (1, 2)),
        Case("topk", 2, strategy="ep2", model="experts"),
    ],
    4: [
        Case("sampled", 0),
        Case("topk", 1, model="untied"),
        Case("sampled", 3),
        *(Case("sampled", 1, precision, strategy="1f1b", model="deep") for precision in ("fp32", "bf16")),
        Case("topk", 1, strategy="1f1b", model="deep-untied"),
    ],
}
RESUMED: dict[int, list[Case]] = {
    1: [Case("sampled", 0), Case("sampled", 2, "bf16"), Case("topk", 3, model="untied"), Case("taid", 1)],
    2: [case for case in CASES[2] if case.labels == "sampled" and case.model != "experts"],
}


# What runs on every rank.


def trainings(bench: Bench, kind: str) -> dict[str, Any]:
    """Those of one kind of strategy: while a process lives, DeepSpeed keeps the layout that its ranks had."""
    from orchestrator.student import engine

    config = engine.deepspeed_config
    # By default DeepSpeed shards no parameter under 100,000 entries, and these models have no other.
    engine.deepspeed_config = lambda train: with_zero(config(train), stage3_param_persistence_threshold=0)
    world = dist.get_world_size()
    results: dict[str, Any] = {}
    chosen = [case for case in CASES[world] if case.kind == kind]
    for case in chosen:
        results[case.name] = train_through(bench, case, world)
    for case in [case for case in RESUMED.get(world, []) if case in chosen]:
        results[f"resumed {case.name}"] = train_resumed(bench, case, world)
    return results


def with_zero(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    return config | {"zero_optimization": config["zero_optimization"] | options}


def train_through(bench: Bench, case: Case, world: int) -> dict[str, Any]:
    from orchestrator.student.checkpoint import save_checkpoint
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import save_model

    job = bench.job(case, world)
    trainer, schedule = start_trainer(job), course(job)
    losses = run_steps(bench, job, trainer, schedule, 0)
    save_checkpoint(trainer.engine, schedule, bench.store, f"through/{world}/{case.name}", STEPS)
    save_model(trainer, bench.store, job, "data/x/tokenizer", {})
    trainer.engine.destroy()
    return {"losses": losses}


def train_resumed(bench: Bench, case: Case, world: int) -> dict[str, Any]:
    """Train three steps, start anew from the checkpoint, and compare the state at the end with that of an unbroken run."""
    from orchestrator.student.checkpoint import restore_checkpoint, save_checkpoint
    from orchestrator.student.trainer import start_trainer

    job = bench.job(case, world, "resumed")
    before, losses = interrupted(bench, job, 3)
    trainer, schedule = start_trainer(job), course(job)
    first = restore_checkpoint(trainer.engine, schedule, bench.store, job.folder)
    losses += run_steps(bench, job, trainer, schedule, first)
    folder = f"again/{world}/{case.name}"
    save_checkpoint(trainer.engine, schedule, bench.store, folder, STEPS)
    trainer.engine.destroy()
    checkpoint = f"checkpoints/step-{STEPS:06d}/engine"
    through = bench.store.path(f"through/{world}/{case.name}/{checkpoint}")
    same = same_states(bench.store.path(f"{folder}/{checkpoint}"), through)
    return {"first": first, "losses": losses, "same": same, "same before": same_states(before, through)}


def same_states(one: Path, other: Path) -> bool:
    """Every tensor and number in the files of two checkpoints is the same, bit for bit."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    pairs = (
        [torch.load(folder / name, weights_only=False) for folder in (one, other)] for name in names if name.endswith(".pt")
    )
    return all(equal(*pair) for pair in pairs)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "__dict__"):
        return type(one) is type(other) and equal(vars(one), vars(other))
    return bool(one == other)


# The tests.


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    print(f"weights and order from seed {SEED}, labels and tokens from fixed seeds")
    return build_bench(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(bench: Bench) -> Callable[[int, Case], dict[str, Any]]:
    """What the trainings on so many ranks brought; they run when the first test asks."""
    root = bench.store.root.parent
    of = cache(lambda world, kind: run_on_ranks(world, root, trainings, bench, kind))
    return lambda world, case: of(world, case.kind)


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Callable[[str, str], tuple[list[list[float]], Weights]]:
    return cache(lambda labels, model: reference(bench, bench.job(Case(labels, 0, model=model), 1), model))


def trained_weights(bench: Bench, case: Case, world: int) -> Weights:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = bench.store.path(f"{bench.job(case, world).folder}/model")
    if case.model == "experts":  # transformers stores experts one by one
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return load_file(folder / "model.safetensors")


ALL = [(world, case) for world in CASES for case in CASES[world]]
MARKED = [pytest.param(*each, marks=pytest.mark.slice) if each[0] == 1 else each for each in ALL]
IDS = [f"{world} ranks {case.name}" for world, case in ALL]


@pytest.mark.parametrize(("world", "case"), MARKED, ids=IDS)
def test_losses_and_weights_equal_the_reference(bench: Bench, results: Any, expected: Any, world: int, case: Case) -> None:
    true_losses, true_weights = expected("sampled" if case.labels == "shifted" else case.labels, case.model)
    losses, weights = results(world, case)[case.name]["losses"], trained_weights(bench, case, world)
    fresh = build_model(MODELS[case.model], VOCAB, SEED, "student").state_dict()
    off, around = deviation(losses, true_losses), detour(weights, true_weights, fresh)
    print(f"losses off by {off:.1e}, weights by {around:.1e}")
    if case.labels == "shifted":
        assert off > 10 * LOSSES["bf16"], "labels one position late must be noticed"
        assert around > 2 * WEIGHTS["bf16"]
        return
    assert off < LOSSES[case.precision]
    assert around < WEIGHTS[case.precision]
    assert set(weights) | {"lm_head.weight"} == set(true_weights)
    assert {w.dtype for w in weights.values()} == {torch.float32 if case.precision == "fp32" else torch.bfloat16}


def test_the_reference_trains_and_clips(bench: Bench, expected: Any) -> None:
    """Were it to stand still, everything could equal it."""
    losses, _ = expected("sampled", "tied")
    assert max(abs(one[0] / losses[0][0] - 1) for one in losses[1:]) > 10 * LOSSES["bf16"]
    job = bench.job(Case("sampled", 0), 1)
    model = build_model(MODELS["tied"], VOCAB, SEED, "student").double()
    dense_loss(bench, job, model, job.order.batch(0))[0].backward()
    assert math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters())) > 1.5 * job.train.grad_clip


RESUMES = [(world, case) for world in RESUMED for case in RESUMED[world]]


@pytest.mark.parametrize(("world", "case"), RESUMES, ids=[f"{world} ranks {case.name}" for world, case in RESUMES])
def test_a_resumed_training_ends_bit_for_bit_alike(results: Any, world: int, case: Case) -> None:
    resumed, through = results(world, case)[f"resumed {case.name}"], results(world, case)[case.name]
    assert resumed["first"] == 3
    assert resumed["losses"] == through["losses"]
    assert resumed["same"]
    assert not resumed["same before"], "the comparison can tell states apart"
