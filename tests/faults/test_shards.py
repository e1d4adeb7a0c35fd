"""A shard of a sharded teacher is killed, or stands still: its gang is replaced, and nothing of it shows in the result.

Every trial strikes one process of a gang of two, at a moment drawn from its seed, while labels are missing: by turns the shard
that leads and the other, by SIGKILL; every third trial stops it instead (SIGSTOP), which nobody is told of.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.faults.trials import Late, strike_in_time, wait_for
from tests.tiny import (
    DISTILL,
    LABELLER,
    Command,
    Json,
    Reference,
    alive,
    assert_every_row_labelled_once,
    commits,
    distill,
    eventually,
    only,
    report,
    started,
    student_weights,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

SHARD = "TeacherShard"
"""In the title of the process of any shard but the leading one."""


@dataclass(frozen=True)
class Strike:
    """What is struck, and when."""

    seed: str
    victim: str
    stopped: bool
    at: float
    """Part of the shards that are committed by then."""

    @classmethod
    def draw(cls, seed: int, number: int) -> Strike:
        draw = random.Random(f"shards:{seed}:{number}")
        return cls(f"{seed}:{number}", (SHARD, LABELLER)[number % 2], number % 3 == 2, 0.8 * draw.random())


@pytest.fixture(scope="module")
def sharded(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The tiny job with a teacher of two shards, undisturbed, on the reference's tokens and teacher."""
    folder = tmp_path_factory.mktemp("sharded")
    job = reference.copy(folder)
    job |= {"teacher": job["teacher"] | {"shards": 2}}
    storage = Path(job["storage"])
    ended = distill(folder / "log", "run", write_job(job)).assert_ok()
    assert ended.started(SHARD)
    assert_every_row_labelled_once(storage)
    assert only(storage / "labels").name == only(reference.storage / "labels").name, "the log is the same for any shards"
    spread, whole = (report(place)["teacher"]["heldout_ce_nats"] for place in (storage, reference.storage))
    assert spread == pytest.approx(whole, abs=1e-6), "it is evaluated on its shards"
    return Reference(job, storage, student_weights(storage), len(commits(storage)), reference.labels_s, reference.student_s)


def test_a_lost_shard_changes_nothing(shard_trial: int, fault_seed: int, sharded: Reference, tmp_path: Path) -> None:
    strike = Strike.draw(fault_seed, shard_trial)
    strike_in_time(shard_trial, strike, lambda sooner, folder: run_struck(strike, sooner, sharded, folder), tmp_path)


def run_struck(strike: Strike, sooner: float, sharded: Reference, folder: Path) -> Json:
    """Strike a gang at work, see the run to its end and compare; the figures of the trial."""
    job = sharded.copy(folder)
    storage = Path(job["storage"])
    with started(folder / "log", *DISTILL, "run", write_job(job)) as run:
        due = max(1, int(strike.at * sooner * sharded.shards))
        wait_for(run, lambda: len(commits(storage)) >= due)
        gang = gang_of(run)
        victim = gang[strike.victim]
        if strike.stopped:
            victim.suspend()
        else:
            victim.kill()
        known, struck = commits(storage), time.monotonic()
        if len(known) == sharded.shards:
            raise Late
        wait_for(run, lambda: len(commits(storage)) > len(known))
        next_commit_s = time.monotonic() - struck
        eventually(lambda: not any(map(alive, gang.values())), "the whole gang is gone")
        ended = run.wait().assert_ok()
    assert "a teacher replica was lost and replaced" in ended.stderr, ended.stderr
    now = commits(storage)
    assert {name: now.get(name) for name in known} == known, "a commit has changed"
    assert_every_row_labelled_once(storage)
    assert student_weights(storage) == sharded.weights
    return {"commits": len(known), "next_commit_s": round(next_commit_s, 1)}


def gang_of(run: Command) -> dict[str, psutil.Process]:
    """The leader and the other shard of the one gang of `run`; raises `Late` if it has gone."""
    members = {title: run.members(title) for title in (LABELLER, SHARD)}
    if not all(members.values()):
        raise Late
    return {title: processes[0] for title, processes in members.items()}
