"""Evaluation during training: against float64, on one rank and on two, and without a trace on the weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from orchestrator.labels.answer import Answer
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame
from orchestrator.models.build import build_model
from orchestrator.spec.labels import TopkLabels
from orchestrator.store.heldout import HeldoutLog, watched_rows
from orchestrator.store.label_log import LabelLog
from orchestrator.store.shard_pages import paged
from orchestrator.store.shards import TokenShard, put_tokens
from orchestrator.student.job import Evaluation, TrainingJob
from orchestrator.tracking import names
from tests.parity.course import (
    GROUP_ROWS,
    MODELS,
    SEED,
    SEQ,
    STEPS,
    VOCAB,
    Bench,
    Case,
    build_bench,
    course,
    interrupted,
    run_steps,
)
from tests.parity.ranks import run_on_ranks

HELDOUT_SHARDS, ROWS = [5, 7, 4], 7
"""Seven rows divide neither among two ranks nor into micro-batches of two."""
IDS = 8
DROPOUT = Case("sampled", 1, model="dropout")
EVALUATED = [
    *(Case("sampled", zero) for zero in range(4)),
    Case("relations", 3),
    Case("sampled", 2, "bf16"),
    Case("sampled", 3, "bf16"),
    Case("hard", 1, model="experts"),
    DROPOUT,
]
SPREAD = [Case("sampled", 1, strategy="ep2", model="experts")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Beside what others train on, held-out rows and a log of what a teacher says on those that are watched."""
    bench, rng = build_bench(tmp_path_factory.mktemp("evaluation")), np.random.default_rng(6)
    records = []
    for shard, rows in enumerate(HELDOUT_SHARDS):
        ids = rng.integers(0, VOCAB, (rows, SEQ + 1), dtype=np.int32)
        tokens = TokenShard([rng.bytes(16) for _ in range(rows)], ids, rng.random((rows, SEQ)) < 0.6)
        records.append(put_tokens(bench.store, "data/x/heldout", shard, tokens, GROUP_ROWS))
    pages = paged(bench.store, "data/x/heldout", records)
    bench = replace(bench, manifest=bench.manifest.model_copy(update={"heldout": pages}))
    tokens = watched_rows(bench.store, "data/x", bench.manifest, ROWS)
    labels = TopkLabels(kind="topk", k=IDS)
    codec, log = Codec(labels, Frame(VOCAB, SEQ)), LabelLog.open(bench.store, {"name": "heldout"})
    arrays = codec.extract(Answer.of_logits(teacher_logits().float()), tokens.row_ids)
    log.commit(0, tokens, codec.pack_groups(arrays, GROUP_ROWS))
    bench.logs["heldout"] = log.key
    return bench


def teacher_logits() -> torch.Tensor:
    return torch.randn(ROWS, SEQ, VOCAB, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 3


def job_of(bench: Bench, case: Case, world: int, stage: str = "student", **train: Any) -> TrainingJob:
    job = bench.job(case, world, stage)
    log = HeldoutLog(bench.logs["heldout"], TopkLabels(kind="topk", k=IDS), ROWS)
    return replace(job, train=job.train.model_copy(update=train), evaluation=Evaluation(2, ROWS, log))


# What runs on every rank.


def compared(bench: Bench, cases: list[Case], whole_parameters: bool) -> dict[str, Any]:
    """By case: evaluations of the fresh model, and the weights with evaluations, without, and with a step done twice."""
    from orchestrator.student import engine

    config = engine.deepspeed_config
    if not whole_parameters:
        # By default DeepSpeed shards no parameter under 100,000 entries, and these models have no other.
        zero = {"stage3_param_persistence_threshold": 0}
        engine.deepspeed_config = lambda train: config(train) | {"zero_optimization": config(train)["zero_optimization"] | zero}
    world = dist.get_world_size()
    found: dict[str, Any] = {}
    for case in cases:
        job = job_of(bench, case, world)
        found[case.name] = {
            "fresh": trained(bench, job, evaluate=True, steps=0)[0],
            "with": trained(bench, job, evaluate=True)[1],
            "without": trained(bench, job, evaluate=False)[1],
            "control": trained(bench, job, evaluate=False, again=2)[1],
        }
    return found


def trained(
    bench: Bench, job: TrainingJob, evaluate: bool, steps: int = STEPS, again: int | None = None
) -> tuple[list[dict[str, float]], str]:
    """The evaluations before the first and after every step, and a hash of the final weights."""
    from orchestrator.student.feed import Feed
    from orchestrator.student.heldout import Evaluator
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import train_step

    trainer, schedule = start_trainer(job), course(job)
    evaluator = Evaluator(trainer, bench.store, job, lambda: None)
    found = [evaluator.evaluate()] if evaluate else []

    def after(done: int) -> bool:
        if evaluate:
            found.append(evaluator.evaluate())
            dict(trainer.tensors(trainer.model, torch.float32))  # as if this were the best
        if done == again:
            train_step(trainer, job, schedule, *next(Feed(bench.store, job, trainer.data_rank, lambda: None).steps(done)))
        return True

    if steps:
        run_steps(bench, job, trainer, schedule, 0, after)
    weights = digest(trainer)
    trainer.engine.destroy()
    return found, weights


def digest(trainer: Any) -> str:
    state = dict(trainer.tensors(trainer.model, torch.float32))
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in state.values())).hexdigest()


# What they are held to.


def dense(bench: Bench, model: torch.nn.Module) -> tuple[float, float]:
    """Cross entropy of `model` on the watched rows, and KL from the teacher over the whole vocabulary; float64."""
    tokens = watched_rows(bench.store, "data/x", bench.manifest, ROWS)
    ids, kept = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.counted())
    with torch.no_grad():
        log_q = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    log_p = teacher_logits().log_softmax(-1)
    ce = -log_q.gather(2, ids[:, 1:, None])[..., 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(ce[kept].mean()), float(kl[kept].mean())


def partition_kl(bench: Bench, model: torch.nn.Module) -> float:
    """KL over the teacher's `IDS` most likely ids and all others as one event; float64."""
    tokens = watched_rows(bench.store, "data/x", bench.manifest, ROWS)
    ids, kept = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.counted())
    with torch.no_grad():
        q = model(input_ids=ids[:, :-1]).logits.softmax(-1)
    p = teacher_logits().softmax(-1)
    top = p.topk(IDS, -1).indices
    ps, qs = p.gather(-1, top), q.gather(-1, top)
    p_rest, q_rest = 1 - ps.sum(-1), 1 - qs.sum(-1)
    kl = (ps * (ps / qs).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    return float(kl[kept].mean())


@pytest.fixture(scope="module")
def results(bench: Bench) -> dict[int, dict[str, Any]]:
    root = bench.store.root.parent
    found = {world: run_on_ranks(world, root, compared, bench, EVALUATED, False) for world in (1, 2)}
    found[2] |= run_on_ranks(2, root, compared, bench, SPREAD, False)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_evaluations_are_those_of_a_plain_pass_in_float64(bench: Bench, results: dict[int, dict[str, Any]], world: int) -> None:
    for case in [*EVALUATED, *(SPREAD if world == 2 else [])]:
        model = build_model(MODELS[case.model], VOCAB, SEED, "student").double().eval()
        model.set_experts_implementation("eager")
        (ce, kl), least = dense(bench, model), partition_kl(bench, model)
        found = results[world][case.name]["fresh"][0]
        near = 1e-6 if case.precision == "fp32" else 2e-3
        assert found[names.HELDOUT_CE_NATS] == pytest.approx(ce, rel=near), case.name
        # fp16 keeps a log-probability to 2^-11 of itself
        assert found[names.HELDOUT_KL_NATS] == pytest.approx(least, rel=max(near, 1e-3)), case.name
        assert least < kl, "it is a lower bound"
        assert abs(kl - least) > 0.05 * kl, "and on this teacher one that can be told from the whole"


def test_ranks_make_no_difference(results: dict[int, dict[str, Any]]) -> None:
    for case in EVALUATED:
        one, two = (results[world][case.name]["fresh"][0] for world in (1, 2))
        near = 1e-6 if case.precision == "fp32" else 2e-3
        assert one == pytest.approx(two, rel=near), case.name


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_leaves_no_trace_in_the_weights(results: dict[int, dict[str, Any]], world: int) -> None:
    for name, found in results[world].items():
        assert found["with"] == found["without"], name
        assert found["control"] != found["without"], f"{name}: weights that differ do show"


# What a step draws, and what a run that goes on draws again.


def broken_off(bench: Bench) -> dict[str, str]:
    """Weights of a model with dropout: trained through twice, resumed after three steps, and through without seeds of steps."""
    from orchestrator.student.checkpoint import restore_checkpoint
    from orchestrator.student.trainer import start_trainer

    world = dist.get_world_size()
    found = {name: trained(bench, job_of(bench, DROPOUT, world), evaluate=False)[1] for name in ("once", "again")}
    job = job_of(bench, DROPOUT, world, "resumed")
    interrupted(bench, job, 3)
    trainer, schedule = start_trainer(job), course(job)
    first = restore_checkpoint(trainer.engine, schedule, bench.store, job.folder)
    run_steps(bench, job, trainer, schedule, first)
    found["resumed"] = digest(trainer)
    trainer.engine.destroy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda _: None)
        found["control"] = trained(bench, job_of(bench, DROPOUT, world), evaluate=False)[1]
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_is_drawn_by_seed_rank_and_step(bench: Bench, world: int) -> None:
    """Fault D of users' reports: a student with dropout came out differently each time, and differently again when resumed."""
    found = run_on_ranks(world, bench.store.root.parent, broken_off, bench)
    assert found["once"] == found["again"] == found["resumed"]
    assert found["control"] != found["once"], "dropout does change the weights"


def test_no_two_steps_or_ranks_draw_the_same() -> None:
    from orchestrator.student.worker import step_seed

    seeds = {step_seed(seed, rank, step) for seed in range(3) for rank in range(8) for step in range(100)}
    assert len(seeds) == 2400
