"""A rank that is killed at any moment of a checkpoint: training goes on from an intact one and ends bit for bit the same."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from orchestrator.store.local import LocalStore
from tests.parity.course import STEPS, Bench, Case, build_bench, course, run_steps
from tests.parity.ranks import run_on_ranks

CASE, RANKS = Case("sampled", 2), 2
STRUCK = 3
"""The checkpoint, by its step, that is being saved when a rank is killed; two are there by then."""
PHASES = {"copying": 2, "writing": 2, "before the manifest": 2, "before it is visible": 2, "removing the oldest": 3}
"""The step that training is resumed from, by the moment of death."""


# What runs on every rank.


def die(marker: Path) -> None:
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def fault(phase: str, step: list[int], marker: Path) -> Iterator[None]:
    """Kill this process in `phase` of the checkpoint of `STRUCK`; `step` is told in its only element."""
    from orchestrator.student import checkpoint, snapshot

    rank, strike = dist.get_rank(), lambda: step[0] == STRUCK

    def before(owner: Any, name: str, on: int, damage: Callable[..., object] = lambda *_: None) -> Any:
        real = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            if rank == on and strike():
                damage(*args)
                die(marker)
            return real(*args, **kwargs)

        return patch.object(owner, name, struck)

    def half(state: Any, path: Path) -> None:
        path.write_bytes(b"half")

    with ExitStack() as patches:
        if phase == "copying":
            patches.enter_context(before(snapshot.HostMemory, "fill", 1))
        elif phase == "writing":
            patches.enter_context(before(snapshot.torch, "save", 1, half))
        elif phase == "before the manifest":
            patches.enter_context(before(checkpoint.CheckpointManifest, "model_dump_json", 0))
        elif phase == "before it is visible":
            patches.enter_context(before(LocalStore, "publish", 0))
        else:
            real = LocalStore.remove

            def remove(store: LocalStore, key: str) -> None:
                if rank == 0 and strike() and key.endswith("step-000001"):
                    next(path for path in store.path(key).rglob("*") if path.is_file()).unlink()
                    die(marker)
                real(store, key)

            patches.enter_context(patch.object(LocalStore, "remove", remove))
        yield


def train_until_killed(bench: Bench, phase: str) -> None:
    from orchestrator.student.checkpoint import CheckpointWriter
    from orchestrator.student.trainer import start_trainer

    job, step = bench.job(CASE, RANKS, phase), [0]
    trainer, schedule = start_trainer(job), course(job)
    writer = CheckpointWriter(trainer.engine, schedule, bench.store, job.folder)

    def begun(done: int) -> bool:
        writer.finish()  # so that the step is that of the checkpoint
        step[0] = done
        writer.start(done)
        return True

    with fault(phase, step, bench.store.root.parent / f"struck {phase}"):
        run_steps(bench, job, trainer, schedule, 0, begun)


def train_to_the_end(bench: Bench) -> dict[str, Any]:
    """An undisturbed training, and what becomes of those that were killed."""
    from orchestrator.student.checkpoint import CheckpointWriter, restore_checkpoint
    from orchestrator.student.trainer import start_trainer

    found: dict[str, Any] = {}
    for phase in ("undisturbed", *PHASES):
        job = bench.job(CASE, RANKS, phase)
        trainer, schedule = start_trainer(job), course(job)
        first = restore_checkpoint(trainer.engine, schedule, bench.store, job.folder)
        writer = CheckpointWriter(trainer.engine, schedule, bench.store, job.folder)
        losses = run_steps(bench, job, trainer, schedule, first, lambda done, writer=writer: writer.start(done) is None)
        writer.finish()
        weights = [p.detach().numpy().tobytes() for p in trainer.model.parameters()]
        dist.barrier()
        found[phase] = {
            "first": first,
            "losses": losses,
            "weights": hashlib.sha256(b"".join(weights)).hexdigest(),
            "left": sorted(path.name for path in bench.store.path(f"{job.folder}/checkpoints").iterdir()),
        }
        trainer.engine.destroy()
    return found


# The test.


def test_a_rank_killed_while_a_checkpoint_is_saved(tmp_path: Path) -> None:
    bench = build_bench(tmp_path)
    for phase in PHASES:
        with pytest.raises((ProcessExitedException, ProcessRaisedException)):
            run_on_ranks(RANKS, tmp_path, train_until_killed, bench, phase)
        assert (tmp_path / f"struck {phase}").exists(), f"nobody was killed while {phase}"
    found = run_on_ranks(RANKS, tmp_path, train_to_the_end, bench)
    undisturbed = found["undisturbed"]
    assert undisturbed["first"] == 0 and len(undisturbed["losses"]) == STEPS
    for phase, first in PHASES.items():
        assert found[phase]["first"] == first, phase
        assert found[phase]["losses"] == undisturbed["losses"][first:], phase
        assert found[phase]["weights"] == undisturbed["weights"], phase
        assert found[phase]["left"] == [f"step-{step:06d}" for step in (STEPS - 1, STEPS)], "half of a checkpoint is gone"
    assert torch.tensor(undisturbed["losses"])[:, 0].diff().abs().min() > 0, "losses tell steps apart"
