"""A step whose loss is not finite leaves weights and optimizer as they were, under every strategy, and is written down.

One micro-batch of one rank gets labels that are not numbers. The training must then end bit for bit as one that never saw the
step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parity.course import MICRO, STEPS, Bench, Case, build_bench, course
from tests.parity.ranks import run_on_ranks

POISONED = 2
CASES = [
    Case("sampled", 0),
    Case("sampled", 1),
    Case("sampled", 2, "bf16"),
    Case("sampled", 3),
    Case("sampled", 3, "bf16"),
    Case("sampled", 1, strategy="1f1b", model="deep"),
    Case("sampled", 1, "bf16", strategy="dualpipev", model="deep"),
    Case("sampled", 1, strategy="ep2", model="experts"),
]


class Board:
    """Takes what the worker puts up, as the actor would."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.warn = self.post = self

    def remote(self, *args: Any) -> None:
        self.warnings += [arg for arg in args if "skipped" in str(arg)]


def trainings(bench: Bench, kind: str) -> dict[str, Any]:
    return {case.name: poisoned_and_left_out(bench, case) for case in CASES if case.kind == kind}


def poisoned_and_left_out(bench: Bench, case: Case) -> dict[str, Any]:
    job = bench.job(case, dist.get_world_size(), f"poisoned-{case.name}")
    skipping = replace(job, train=job.train.model_copy(update={"on_nonfinite": _skip(1)}))
    poisoned, clean = train(bench, skipping, poison=True), train(bench, job, poison=False)
    same = all(torch.equal(one, other) for one, other in zip(poisoned["state"], clean["state"], strict=True))
    agreed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(agreed, same)
    strict = replace(job, stage=f"strict-{case.name}")
    return {
        "same": all(agreed),
        "losses": [poisoned["losses"], clean["losses"]],
        "warnings": poisoned["warnings"],
        "stopped": train(bench, strict, poison=True)["stopped"],
    }


def _skip(count: int) -> Any:
    from orchestrator.spec.train import Skip

    return Skip(skip=count)


def train(bench: Bench, job: Any, poison: bool) -> dict[str, Any]:
    """Train with one step spoilt or, without `poison`, left out; the losses, and the state at the end on this rank."""
    from orchestrator.errors import DataError
    from orchestrator.student.feed import Feed
    from orchestrator.student.nonfinite import Skips
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import train_step

    trainer, schedule, board = start_trainer(job), course(job), Board()
    skips = Skips(bench.store, job, board, trainer.data_rank)
    losses, stopped = [], None
    for step, micro_batches in Feed(bench.store, job, trainer.data_rank, lambda: None, labels=trainer.reads_labels).steps(0):
        if step == POISONED:
            if not poison:
                continue
            if trainer.reads_labels and trainer.data_rank == job.train.data_parallel - 1:
                micro_batches[1] = replace(micro_batches[1], soft=spoilt(micro_batches[1].soft))
        result = train_step(trainer, job, schedule, step, micro_batches)
        assert result.applied is (step != POISONED)
        if result.applied:
            losses.append(float(result.means[0]))
            continue
        try:
            skips.take(step, result.means, result.losses)
        except DataError as error:
            stopped = str(error)
            break
    state = [p.detach().clone() for p in trainer.engine.module.parameters()]
    state += [t.clone() for s in torch_optimizer(trainer).state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    trainer.engine.destroy()
    return {"losses": losses, "state": state, "warnings": board.warnings, "stopped": stopped}


def spoilt(soft: Any) -> Any:
    return soft.map(lambda t: t * torch.nan if t.is_floating_point() else t)


def torch_optimizer(trainer: Any) -> torch.optim.Optimizer:
    optimizer = trainer.engine.optimizer
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return build_bench(tmp_path_factory.mktemp("nonfinite"))


@pytest.fixture(scope="module")
def results(bench: Bench) -> Any:
    root = bench.store.root.parent
    of = cache(lambda kind: run_on_ranks(2, root, trainings, bench, kind))
    return lambda case: of(case.kind)[case.name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_as_if_the_step_had_not_been(results: Any, case: Case) -> None:
    found = results(case)
    poisoned, clean = found["losses"]
    assert found["same"] and poisoned == clean and len(clean) == STEPS - 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rows_are_named_and_a_strict_training_stops(bench: Bench, results: Any, case: Case) -> None:
    from orchestrator.student.nonfinite import skipped_steps

    found = results(case)
    job = bench.job(case, 2, f"poisoned-{case.name}")
    (skipped,) = skipped_steps(bench.store, job.folder)
    ranks = job.train.data_parallel
    rows = job.order.share(POISONED, ranks - 1, ranks)[MICRO : 2 * MICRO]
    assert (skipped.step, skipped.loss, list(skipped.rows)) == (POISONED, "nan", [f"{s}:{r}" for s, r in rows])
    assert found["warnings"] == [
        f"{job.stage}: skipped step {POISONED}: the loss of rows {', '.join(skipped.rows)} is not finite"
    ]
    assert f"rows {', '.join(skipped.rows)} is not finite; train.on_nonfinite: {{skip: 1}} goes on" in found["stopped"]
    assert not Path(bench.store.path(f"strict-{case.name}")).exists()
