"""Two runs at once that want the same labels: they share the work, and when one is killed the other takes it over."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import psutil
import pytest

from tests.tiny import (
    DISTILL,
    LABELLER,
    Command,
    Json,
    Reference,
    alive,
    assert_every_row_labelled_once,
    commits,
    eventually,
    kill,
    metric_points,
    started,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

AHEAD = 3
MOST = 1.1
"""Times the teacher work of one run that two may take together."""


def two_jobs(reference: Reference, folder: Path) -> tuple[Json, Json]:
    """Jobs in one storage that differ in their objective alone; their students hold the labelling back, so that both last."""
    job = reference.copy(folder)
    one = job | {"labels": job["labels"] | {"run_ahead": AHEAD}}
    return one, one | {"name": "other", "objective": {"alpha": 0.5}}


def labelled_tokens(storage: Path, name: str) -> int:
    """Tokens that the teacher of the run `name` has labelled."""
    return sum(point["metrics"].get("label/tokens", 0) for point in metric_points(storage, "labels", name))


def all_tokens(job: Json, storage: Path) -> int:
    """Tokens in all shards that are committed."""
    return sum(json.loads(record)["rows"] for record in commits(storage).values()) * job["data"]["seq_len"]


def traces(storage: Path) -> list[Path]:
    """Claims and heartbeats in the storage."""
    return [*storage.glob("labels/*/claims/*.json"), *storage.glob("labels/*/writers/*.json")]


def test_two_runs_share_the_work(reference: Reference, tmp_path: Path) -> None:
    one, other = two_jobs(reference, tmp_path)
    storage = Path(one["storage"])
    with (
        started(tmp_path / "one", *DISTILL, "run", write_job(one)) as first,
        started(tmp_path / "other", *DISTILL, "run", write_job(other)) as second,
    ):
        first.wait().assert_ok()
        second.wait().assert_ok()
    shares = [labelled_tokens(storage, name) for name in ("tiny", "other")]
    print({"shares": shares, "of": all_tokens(one, storage)})
    assert all_tokens(one, storage) <= sum(shares) <= MOST * all_tokens(one, storage)
    assert min(shares) > 0, "each has done some"
    assert_every_row_labelled_once(storage)
    assert traces(storage) == []


def test_a_run_takes_over_from_one_that_is_killed(reference: Reference, tmp_path: Path) -> None:
    one, other = two_jobs(reference, tmp_path)
    storage = Path(one["storage"])
    with (
        started(tmp_path / "one", *DISTILL, "run", write_job(one)) as first,
        started(tmp_path / "other", *DISTILL, "run", write_job(other)) as second,
    ):
        held = claim_of_a_stopped_teacher(first, storage)
        family = first.family()
        first.kill()
        assert sum(map(kill, family)) > 0, "the kill has hit"
        assert held.exists() and not commits(storage).get(held.name), "it held a claim"
        second.wait().assert_ok()
        assert commits(storage).get(held.name), "the other has labelled that shard"
        eventually(lambda: not any(map(alive, family)), "the killed run's processes are gone")
    assert_every_row_labelled_once(storage, "other")
    assert held not in traces(storage) and not list(storage.glob("labels/*/writers/*"))


def claim_of_a_stopped_teacher(run: Command, storage: Path) -> Path:
    """A claim of `run`, whose teacher has been stopped before it could commit that shard."""
    found: list[Path] = []

    def stopped() -> bool:
        teachers = run.members(LABELLER)
        if not teachers or len(commits(storage)) < AHEAD or not claims_of(run, storage):
            return False
        for teacher in teachers:
            teacher.suspend()
            eventually(lambda t=teacher: t.status() == psutil.STATUS_STOPPED, "it stands still", every_s=0.001)
        found.extend(claim for claim in claims_of(run, storage) if claim.name not in commits(storage))
        if not found:
            for teacher in teachers:
                teacher.resume()
        return bool(found)

    run.until(stopped, every_s=0.001)
    return found[0]


def claims_of(run: Command, storage: Path) -> list[Path]:
    """The claims that name the writer whose heartbeat names the process of `run`."""
    mine: list[Path] = []
    for claim in storage.glob("labels/*/claims/*.json"):
        with contextlib.suppress(FileNotFoundError):
            writer = json.loads(claim.read_text())["writer"]
            holder = json.loads((claim.parent.parent / "writers" / f"{writer}.json").read_text())["holder"]
            mine += [claim] if f":{run.pid} " in holder else []
    return mine
