"""Whatever is killed and whenever: no label is lost or doubled, and the student ends with the very same weights.

Every trial kills one thing in one run, at a moment drawn from its seed, with SIGKILL: the driver (its process group, or
every process of the run, as a power cut would), the teacher actor, or the training worker. A trial counts only if the
kill hit a living process of a run that was under way.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.store.row_groups import to_parquet
from tests.faults.trials import Late, strike_in_time, wait_for
from tests.tiny import (
    DISTILL,
    LABELLER,
    STEPS,
    TRAINER,
    Command,
    Ended,
    Json,
    Reference,
    alive,
    assert_every_row_labelled_once,
    commits,
    distill,
    eventually,
    kill,
    only,
    report,
    started,
    statuses,
    steps_seen,
    student_weights,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

TITLES = {"teacher": LABELLER, "worker": TRAINER}
MOMENTS = {
    "driver": ("time", "commits", "step", "checkpoint"),
    "teacher": ("time", "commits"),
    "worker": ("time", "step", "checkpoint"),
}
KINDS = tuple(MOMENTS)


@dataclass(frozen=True)
class Trial:
    """What is killed, and when."""

    seed: str
    kind: str
    whole: bool
    """With the driver, every other process of the run."""
    moment: str
    at: float
    """Where between the first and the last such moment, from 0 to 1."""

    @classmethod
    def draw(cls, seed: int, number: int) -> Trial:
        """Kinds take turns, and the moments of a kind take turns from a random first one; all else is random."""
        name = f"{seed}:{number}"
        kind = KINDS[number % len(KINDS)]
        moments = MOMENTS[kind]
        turn = random.Random(f"{seed}:{kind}").randrange(len(moments)) + number // len(KINDS)
        draw = random.Random(name)
        moment = moments[turn % len(moments)]
        return cls(name, kind, kind == "driver" and (moment == "checkpoint" or draw.random() < 0.5), moment, draw.random())


@dataclass(frozen=True)
class Killed:
    """What the kill met."""

    processes: int
    titles: list[str]
    after_s: float
    """Since labelling began."""
    commits: dict[str, bytes]
    steps: int


def test_killed_and_continued(trial: int, fault_seed: int, reference: Reference, tmp_path: Path) -> None:
    drawn = Trial.draw(fault_seed, trial)
    strike_in_time(trial, drawn, lambda sooner, folder: run_trial(drawn, sooner, reference, folder), tmp_path)


def run_trial(trial: Trial, sooner: float, reference: Reference, folder: Path) -> Json:
    """Kill, see the run to its end, and compare; the figures of the trial."""
    job = reference.copy(folder)
    storage, file = Path(job["storage"]), write_job(job)
    with started(folder / "log", *DISTILL, "run", file) as run:
        await_moment(trial, sooner, run, storage, reference)
        killed = kill_now(trial, run, storage)
        if trial.kind == "teacher" and len(killed.commits) == reference.shards:
            raise Late
        began = time.monotonic()
        assert killed.processes >= 1
        ended = see_through(trial, run, folder, file)
        finish_s = time.monotonic() - began
    ended.assert_ok()
    if trial.kind == "worker":
        assert "a training worker died; retry 1/" in ended.stderr, ended.stderr
    faults = [fault["text"] for fault in report(storage)["faults"]]
    expected = {"worker": "a training worker died; retry 1/", "driver": "attempt 1 was killed"}.get(trial.kind, "")
    assert any(expected in text for text in faults) or not expected, faults
    now = commits(storage)
    assert {name: now.get(name) for name in killed.commits} == killed.commits, "a commit has changed"
    assert_every_row_labelled_once(storage)
    assert student_weights(storage) == reference.weights
    assert not list(storage.rglob("checkpoints"))
    return {
        "hit": killed.titles,
        "after_s": round(killed.after_s, 2),
        "commits": len(killed.commits),
        "steps": killed.steps,
        "finish_s": round(finish_s, 1),
    }


def see_through(trial: Trial, run: Command, folder: Path, file: Path) -> Ended:
    """How the run ended after the kill, or, where the driver was killed, how the next run of the same job did."""
    if trial.kind != "driver":
        return run.wait()
    left_behind = run.family()
    ended = distill(folder / "log-again", "run", file)
    eventually(lambda: not any(map(alive, left_behind)), "the killed driver's processes are gone")
    return ended


# When.


def await_moment(trial: Trial, sooner: float, run: Command, storage: Path, reference: Reference) -> None:
    """Return at the moment of `trial`; raises `Late` if what is to be killed has gone by then."""
    at = trial.at * sooner
    wait_for(run, lambda: any(storage.glob("labels/*/key.json")))
    begun = time.monotonic()
    span_s = reference.labels_s if trial.kind == "teacher" else reference.student_s
    reached: dict[str, Callable[[], Any]] = {
        "time": lambda: time.monotonic() - begun >= at * span_s,
        "commits": lambda: len(commits(storage)) > int(at * (reference.shards - 1)),
        "step": lambda: steps_seen(storage) > int(at * (STEPS - 1)),
        "checkpoint": lambda: frozen_in_checkpoint(run, storage, int(at * (STEPS - 60))),
    }
    wait_for(run, reached[trial.moment])
    if trial.kind in TITLES:
        wait_for(run, lambda: run.members(TITLES[trial.kind]))


def frozen_in_checkpoint(run: Command, storage: Path, step: int) -> bool:
    """Whether the training worker stands still between making the folder of a checkpoint after `step` and naming it."""
    if not partial_checkpoints(storage, step):
        return False
    workers = run.members(TRAINER)
    for worker in workers:
        worker.suspend()
    for worker in workers:
        eventually(lambda w=worker: w.status() == psutil.STATUS_STOPPED, "the worker has stopped", every_s=0.001)
    if workers and partial_checkpoints(storage, step):
        return True
    for worker in workers:
        worker.resume()
    return False


def partial_checkpoints(storage: Path, step: int = 0) -> list[Path]:
    found = storage.glob("student/*/checkpoints/.tmp-step-*")
    return [folder for folder in found if int(folder.name.split("-")[2]) > step]


# What.


def kill_now(trial: Trial, run: Command, storage: Path) -> Killed:
    """SIGKILL what `trial` says; raises `Late` if it had ended."""
    assert run.running
    victims = run.members(TITLES[trial.kind])[:1] if trial.kind in TITLES else []
    titles = [title(process) for process in victims]
    known, steps, when = commits(storage), steps_seen(storage), time.time()
    if trial.kind == "driver":
        family = run.family() if trial.whole else []
        titles = ["driver", *filter(None, map(title, family))]
        run.kill()
        hits = 1 + sum(map(kill, family))
    else:
        hits = sum(map(kill, victims))
    if not hits:
        raise Late
    if trial.moment == "checkpoint":
        assert partial_checkpoints(storage), "killed outside of a checkpoint"
    began = min(f.stat().st_mtime for f in storage.glob("labels/*/key.json"))
    return Killed(hits, titles, when - began, known, steps)


def title(process: psutil.Process) -> str:
    """Name of a Ray worker; empty for other processes."""
    try:
        first = process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""
    return first if first.startswith("ray::") else ""


# That the comparison can fail.


def test_a_changed_label_gives_other_weights(reference: Reference, tmp_path: Path) -> None:
    job = reference.copy(tmp_path, "labels")
    storage = Path(job["storage"])
    tamper(only(storage / "labels"))
    distill(tmp_path / "log", "run", write_job(job)).assert_ok()
    assert statuses(storage)["labels"] == "reused"
    assert_every_row_labelled_once(storage)
    assert student_weights(storage) != reference.weights


def tamper(log: Path) -> None:
    """Give the labels of one row of one shard to another row, and put that shard in the place of the true one."""
    commit = sorted((log / "commits").iterdir())[0]
    record = json.loads(commit.read_text())
    file = log / "data" / record["file"]
    with pq.ParquetFile(file) as opened:
        table, *others = [opened.read_row_group(number) for number in range(opened.num_row_groups)]
    order = [1, 0, *range(2, table.num_rows)]
    for column in set(table.column_names) - {"row_id", "ids_sha256"}:
        index = table.column_names.index(column)
        table = table.set_column(index, table.schema.field(index), table[column].take(pa.array(order)))
    data, footer_bytes = to_parquet([table, *others])
    file.write_bytes(data)
    footer = {"footer_bytes": footer_bytes, "footer_sha256": hashlib.sha256(data[-footer_bytes:]).hexdigest()}
    commit.write_text(json.dumps(record | footer | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}))


def test_lost_labels_are_repaired_alone(reference: Reference, tmp_path: Path) -> None:
    """Half the label files deleted: the run says what to do, and after that only the lost shards are labelled again."""
    job = reference.copy(tmp_path, "labels")
    storage, file = Path(job["storage"]), write_job(job)
    log, before = only(storage / "labels"), commits(storage)
    lost = sorted(before)[::2]
    for name in lost:
        (log / "data" / json.loads(before[name])["file"]).unlink()
    refused = distill(tmp_path / "refused", "run", file)
    assert refused.code == 5 and f"distill labels repair {log}" in refused.stderr.splitlines()[-1]
    verified = distill(tmp_path / "verify", "labels", "verify", log)
    assert verified.code == 5 and f"{len(lost)} missing" in verified.stderr
    distill(tmp_path / "repair", "labels", "repair", log).assert_ok()
    assert commits(storage) == {name: data for name, data in before.items() if name not in lost}
    ended = distill(tmp_path / "again", "run", file).assert_ok()
    assert f"resuming, {len(before) - len(lost)}/{len(before)} shards done" in ended.stderr
    assert commits(storage) == before and student_weights(storage) == reference.weights
    assert "core_worker" not in ended.stderr
    assert_every_row_labelled_once(storage)
