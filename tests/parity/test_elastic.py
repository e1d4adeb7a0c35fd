"""A training begun on one number of ranks goes on on another: same order, same optimizer state, same weights at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model
from orchestrator.store.records import MANIFEST
from orchestrator.student.universal import check_elastic
from tests.parity.course import MODELS, SEED, STEPS, VOCAB, Bench, Case, build_bench, course, detour, deviation
from tests.parity.ranks import run_on_ranks
from tests.parity.test_checkpoints import Malice, flip_byte, sign

STOP = 3
"""The checkpoint that is resumed from."""
LOSSES, WEIGHTS = 1e-5, 1e-5
"""How far both may be from those of the undisturbed training: relative, and as a share of the way that weights came."""
CASES = [Case("sampled", zero) for zero in range(4)]
MOVES = [(2, 1), (1, 2), (2, 4), (4, 1)]
FORGETFUL = MOVES[:2]
"""Moves that are made once more without the optimizer state."""
FAULTY = Case("sampled", 2)


# What runs on every rank.


def start(bench: Bench, case: Case) -> tuple[Any, Any]:
    """A fresh trainer, with a buffer that no seed can restore, and its schedule."""
    from orchestrator.student.trainer import start_trainer

    job = bench.job(case, dist.get_world_size())
    trainer = start_trainer(job)
    trainer.model.register_buffer("balance", torch.zeros(3))
    return trainer, course(job)


def train(bench: Bench, case: Case, trainer: Any, schedule: Any, first: int, after: Callable[[int], None]) -> list[list[float]]:
    """Losses of the steps from `first` to the end; `after` is told the steps done."""
    from orchestrator.student.feed import Feed
    from orchestrator.student.worker import train_step

    job, losses = bench.job(case, dist.get_world_size()), []
    for step, micro_batches in Feed(bench.store, job, trainer.data_rank, lambda: None).steps(first):
        losses.append(train_step(trainer, job, schedule, step, micro_batches).means.tolist())
        after(step + 1)
    return losses


def keep_weights(trainer: Any, file: Path) -> None:
    state = dict(trainer.tensors(trainer.model, torch.float32))
    state.pop("balance", None)  # only the first rank has a state
    if dist.get_rank() == 0:
        torch.save(state, file)


def undisturbed(bench: Bench, root: Path) -> dict[str, Any]:
    """Train all cases through, with checkpoints on the way."""
    from orchestrator.student.checkpoint import save_checkpoint

    world, found = dist.get_world_size(), {}
    for case in CASES:
        trainer, schedule = start(bench, case)

        def keep(done: int, trainer: Any = trainer, schedule: Any = schedule, folder: str = f"{world}/{case.name}") -> None:
            if done in (STOP - 1, STOP):
                trainer.model.balance.fill_(done)
                save_checkpoint(trainer.engine, schedule, bench.store, folder, done)

        found[case.name] = train(bench, case, trainer, schedule, 0, keep)
        keep_weights(trainer, root / f"through-{world}-{case.name}.pt")
        trainer.engine.destroy()
    return found


def moved(bench: Bench, root: Path, origin: int) -> dict[str, Any]:
    """Go on from the checkpoints of `origin` ranks; some moves once more under ZeRO-1 without its optimizer state."""
    from orchestrator.student.checkpoint import restore_checkpoint, save_checkpoint

    world, found = dist.get_world_size(), {}
    again = [(CASES[1], True)] if (origin, world) in FORGETFUL else []
    for case, forgetful in [*((case, False) for case in CASES), *again]:
        trainer, schedule = start(bench, case)
        name, folder = f"{case.name}{'-forgetful' * forgetful}", f"{origin}/{case.name}"
        first = restore_checkpoint(trainer.engine, schedule, bench.store, folder)
        balance = trainer.model.balance.tolist()
        if forgetful:
            for state in trainer.engine.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        losses = train(bench, case, trainer, schedule, first, lambda _: None)
        keep_weights(trainer, root / f"moved-{origin}-{world}-{name}.pt")
        found[name] = {"first": first, "losses": losses, "balance": balance, "kept": bench.store.keys(f"{folder}/checkpoints")}
        trainer.engine.destroy()
        if forgetful:
            trainer, schedule = start(bench, case)
            restore_checkpoint(trainer.engine, schedule, bench.store, folder)
            save_checkpoint(trainer.engine, schedule, bench.store, folder, STOP + 1)
            found["after the next checkpoint"] = bench.store.keys(f"{folder}/checkpoints")
            trainer.engine.destroy()
    return found


def damaged(bench: Bench, root: Path) -> dict[str, Any]:
    """On one rank, what restoring from two brings after one damage after another."""
    from orchestrator.student.checkpoint import restore_checkpoint

    folder = f"2/{FAULTY.name}"
    checkpoints = bench.store.path(f"{folder}/checkpoints")
    trainer, schedule = start(bench, FAULTY)
    newest, before, copy = (checkpoints / f"{name}{step:06d}" for name, step in NAMES)
    converted = sorted(copy.rglob("exp_avg.pt"))[0]
    inode, canary = converted.stat().st_ino, root / "canary"
    found: dict[str, Any] = {}

    def attempt(name: str) -> None:
        try:
            found[name] = restore_checkpoint(trainer.engine, schedule, bench.store, folder)
        except Exception as error:
            found[name] = type(error).__name__

    attempt("whole")
    found["used again"] = converted.stat().st_ino == inode
    intact = converted.read_bytes()
    flip_byte(converted)
    attempt("a byte of the converted one")
    found["made again"] = converted.read_bytes() == intact
    flip_byte(sorted((newest / "engine").glob("*optim_states.pt"))[-1])
    attempt("a byte of the newest")
    torch.save({"optimizer_state_dict": Malice(canary)}, sorted((before / "engine").glob("*optim_states.pt"))[-1])
    sign(before)
    checkpoints.joinpath(f"universal-{before.name}", MANIFEST).unlink()
    attempt("a foreign pickle")
    found["code ran"] = canary.exists()
    trainer.engine.destroy()
    return found


NAMES = [("step-", STOP), ("step-", STOP - 1), ("universal-step-", STOP)]


# The tests.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Path, dict[str, Any]]:
    """All trainings: what the programs found, by name and number of ranks. A storage may be called as one likes."""
    root = tmp_path_factory.mktemp("c++ (elastic)")
    bench, found = build_bench(root), {}
    for world in (1, 2, 4):
        found[f"undisturbed-{world}"] = run_on_ranks(world, root, undisturbed, bench, root)
    for origin, world in ((2, 4), (1, 2), (2, 1), (4, 1)):
        found[f"moved-{origin}-{world}"] = run_on_ranks(world, root, moved, bench, root, origin)
    found["damaged"] = run_on_ranks(1, root, damaged, bench, root)
    return bench, root, found


def differences(runs: Any, case: Case, origin: int, world: int, suffix: str = "") -> tuple[float, float]:
    """Largest relative difference of a loss term, and of the weights as a share of the way they came, after a move."""
    _, root, found = runs
    through, after = found[f"undisturbed-{origin}"][case.name], found[f"moved-{origin}-{world}"][case.name + suffix]
    names = (f"through-{origin}-{case.name}.pt", f"moved-{origin}-{world}-{case.name}{suffix}.pt")
    true, weights = (torch.load(root / name) for name in names)
    fresh = build_model(MODELS[case.model], VOCAB, SEED, "student").state_dict()
    return deviation(through[:STOP] + after["losses"], through), detour(weights, true, fresh)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("origin", "world"), MOVES, ids=[f"{origin} to {world}" for origin, world in MOVES])
def test_a_moved_training_ends_like_an_undisturbed_one(runs: Any, case: Case, origin: int, world: int) -> None:
    after = runs[2][f"moved-{origin}-{world}"][case.name]
    losses, weights = differences(runs, case, origin, world)
    print(f"losses off by {losses:.1e}, weights by {weights:.1e}")
    assert after["first"] == STOP
    assert len(after["losses"]) == STEPS - STOP
    assert losses < LOSSES
    assert weights < WEIGHTS
    assert after["balance"] == [STOP] * 3, "a buffer that training changes"


@pytest.mark.parametrize(("origin", "world"), FORGETFUL, ids=["2 to 1", "1 to 2"])
def test_without_its_optimizer_state_it_would_not(runs: Any, origin: int, world: int) -> None:
    losses, weights = differences(runs, CASES[1], origin, world, "-forgetful")
    print(f"losses off by {losses:.1e}, weights by {weights:.1e}")
    assert losses > 3 * LOSSES
    assert weights > 100 * WEIGHTS


@pytest.mark.parametrize(("origin", "world"), FORGETFUL, ids=["2 to 1", "1 to 2"])
def test_the_converted_copy_stays_until_the_next_checkpoint(runs: Any, origin: int, world: int) -> None:
    found = runs[2][f"moved-{origin}-{world}"]
    own = [f"step-{step:06d}" for step in (STOP - 1, STOP)]
    assert found["sampled-tied-zero-zero0-fp32"]["kept"] == own, "without ZeRO there is nothing to convert"
    for case in CASES[1:]:
        assert found[case.name]["kept"] == [*own, f"universal-step-{STOP:06d}"]
    assert found["after the next checkpoint"] == [f"step-{step:06d}" for step in (STOP, STOP + 1)]


def test_damage_to_source_or_copy_is_noticed(runs: Any) -> None:
    assert runs[2]["damaged"] == {
        "whole": STOP,
        "used again": True,
        "a byte of the converted one": STOP,
        "made again": True,
        "a byte of the newest": STOP - 1,
        "a foreign pickle": "IntegrityError",
        "code ran": False,
    }


@pytest.mark.parametrize("experts", [True, False])
def test_what_cannot_move_says_so(experts: bool) -> None:
    engine = SimpleNamespace(module=nn.Identity(), has_moe_layers=experts)
    if not experts:
        return check_elastic(engine, 4)
    with pytest.raises(SpecError, match=r"^train\.workers: this training began on 4 workers"):
        check_elastic(engine, 4)
