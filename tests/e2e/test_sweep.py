"""A sweep from outside: killed in the middle and run again, it makes what its runs share once and trains nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import (
    DISTILL,
    LABELLER,
    Ended,
    Json,
    commits,
    contents,
    distill,
    metric_points,
    report,
    started,
    statuses,
    tiny_job,
    write_corpus,
    write_job,
)

pytestmark = pytest.mark.timeout(1800)

RUNS = ("tiny", "tiny-2", "tiny-3")
ALPHAS = (0.0, 0.5, 1.0)
COSTLY = ("data", "teacher", "labels", "student")
SWEEP_STEPS = 60


def raylets(ended: Ended) -> int:
    """How many Rays a command started: each has one raylet on this machine."""
    return sum("/raylet/raylet " in title for title in ended.titles)


def stages_of(storage: Path, name: str) -> list[str]:
    found = statuses(storage, name)
    return [found[stage] for stage in COSTLY]


def swept(folder: Path, job: Json) -> tuple[str | Path, ...]:
    values = ",".join(map(str, ALPHAS))
    return ("sweep", write_job(job), "--grid", f"objective.alpha={values}", "--out", folder / "page.html", "--json")


def test_a_killed_sweep_goes_on_and_shares_what_its_runs_have_in_common(tmp_path: Path) -> None:
    storage = tmp_path / "store"
    job = tiny_job(write_corpus(tmp_path / "corpus"), storage)
    job["train"] |= {"steps": SWEEP_STEPS}
    arguments = swept(tmp_path, job)

    with started(tmp_path / "killed", *DISTILL, *arguments) as command:
        command.until(lambda: metric_points(storage, "student", "tiny-2"), every_s=0.1)
        command.end()
    first = contents(storage / "runs" / "tiny")
    labelled = commits(storage)
    assert labelled and "report.json" in first
    assert not (storage / "runs" / "tiny-2" / "report.json").exists()

    ended = distill(tmp_path / "again", *arguments).assert_ok()
    assert raylets(ended) == 1
    assert commits(storage) == labelled and not ended.started(LABELLER)
    assert contents(storage / "runs" / "tiny") == first
    for name in RUNS[1:]:
        assert stages_of(storage, name) == ["reused", "reused", "reused", "ran"], name
    for name in RUNS:
        steps = [point["step"] for point in metric_points(storage, "student", name)]
        assert steps == sorted(set(steps)) and steps[-1] == SWEEP_STEPS - 1, name

    shown = json.loads(ended.stdout)
    assert [run["name"] for run in shown["runs"]] == list(RUNS) and shown["differs"] == ["objective.alpha"]
    assert [run["differs"]["objective.alpha"] for run in shown["runs"]] == list(ALPHAS)
    for run in shown["runs"]:
        own = report(storage, run["name"])["student"]["heldout_ce_nats"]
        assert run["status"] == "finished" and run["figures"]["heldout_ce_nats"] == own
    assert len({run["figures"]["heldout_ce_nats"] for run in shown["runs"]}) == len(RUNS)
    assert Path(shown["page"]) == tmp_path / "page.html"

    everything = contents(storage)
    last = distill(tmp_path / "third", *arguments).assert_ok()
    assert raylets(last) == 0 and contents(storage) == everything
    assert json.loads(last.stdout) == shown
