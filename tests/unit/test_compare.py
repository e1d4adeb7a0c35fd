"""What a comparison says of runs: where their jobs differ, which are repetitions, their intervals, and what is best."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from orchestrator.compare.figures import BY_NAME
from orchestrator.compare.groups import Comparison, compared, differences, finding, interval
from orchestrator.compare.read import read_runs
from orchestrator.compare.table import aligned, as_dict, as_text
from orchestrator.errors import SpecError
from orchestrator.run_lookup import find_run
from orchestrator.spec.base import flat
from orchestrator.store.lock import exclusive
from tests.past_runs import STEPS, write_run

CE = BY_NAME["heldout_ce_nats"]


def comparison(folder: Path, *names: str) -> Comparison:
    return compared(read_runs(names, str(folder / "store")))


# Intervals.


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.31, 3.30, 3.35], list(np.random.default_rng(0).normal(5, 2, 12))])
def test_an_interval_is_the_one_of_scipy(values: list[float]) -> None:
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values).ends == pytest.approx((low, high)) and interval(values).n == len(values)


def test_an_interval_uses_the_quantiles_of_printed_tables() -> None:
    """Student's t at 97.5 %: 12.706, 4.303 and 2.262 for 1, 2 and 9 degrees of freedom."""
    for n, quantile in ((2, 12.706), (3, 4.303), (10, 2.262)):
        values = [float(i) for i in range(n)]
        assert interval(values).half == pytest.approx(quantile * np.std(values, ddof=1) / math.sqrt(n), rel=2e-4)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(1).normal(7.0, 3.0, (2000, 3))
    covered = np.mean([low <= 7.0 <= high for low, high in (interval(list(row)).ends for row in draws)])
    normal = np.mean([abs(row.mean() - 7.0) <= 1.96 * row.std(ddof=1) / math.sqrt(3) for row in draws])
    assert abs(covered - 0.95) < 0.015 and normal < 0.9, "a normal interval would be too narrow for three runs"


def test_one_run_has_no_interval() -> None:
    assert interval([3.0]) == (3.0, None, 1)


# Differences and groups.


def test_only_keys_that_differ_are_named_and_a_missing_one_counts() -> None:
    jobs = [{"name": "a", "seed": 0, "x": 1}, {"name": "b", "seed": 0, "x": 2, "y": True}]
    assert differences(jobs) == {"x": [1, 2], "y": ["–", True]}
    assert differences([jobs[0], jobs[0]]) == {}


def test_sections_become_dotted_keys_as_in_an_override() -> None:
    job = {"a": {"b": [1, 2], "c": [{"kind": "x"}, {"kind": "y"}]}, "d": None}
    assert flat(job) == {"a.b": [1, 2], "a.c.0.kind": "x", "a.c.1.kind": "y", "d": None}


def test_runs_that_are_equal_but_for_seed_name_and_speed_are_one_group(tmp_path: Path) -> None:
    write_run(tmp_path, "a", "seed=1", ce=3.40)
    write_run(tmp_path, "b", "objective.alpha=0.5", ce=3.50)
    write_run(tmp_path, "c", "seed=2", "name=other", "train.workers=2", "tracking.enabled=false", ce=3.44)
    write_run(tmp_path, "d", "objective.alpha=0.5", "train.steps=300", ce=3.60)
    found = comparison(tmp_path, "a", "b", "c", "d")
    assert [[run.name for run in group.runs] for group in found.groups] == [["a", "c"], ["b"], ["d"]]
    assert [group.values for group in found.groups] == [
        {"objective.alpha": 0.1, "train.steps": STEPS},
        {"objective.alpha": 0.5, "train.steps": STEPS},
        {"objective.alpha": 0.5, "train.steps": 300},
    ]
    assert found.groups[0].figure(CE.name) == pytest.approx(interval([3.40, 3.44]))
    assert found.best_runs(CE) == {"a"} and found.best_groups(CE) == {found.groups[0].label}
    assert found.differs["seed"] == [1, 0, 2, 0] and "tracking.enabled" in found.differs and "name" not in found.differs


def test_the_order_of_runs_changes_no_group(tmp_path: Path) -> None:
    for i, (alpha, seed) in enumerate(itertools.product((0, 1), (0, 1))):
        write_run(tmp_path, f"r{i}", f"objective.alpha={alpha}", f"seed={seed}", ce=3.3 + i / 100)
    for order in itertools.permutations(("r0", "r1", "r2", "r3")):
        groups = {frozenset(run.name for run in group.runs) for group in comparison(tmp_path, *order).groups}
        assert groups == {frozenset({"r0", "r1"}), frozenset({"r2", "r3"})}


def begun(directory: Path, started_s: float, **more: str) -> None:
    file = directory / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"started_s": started_s} | more))


def test_a_seed_counts_once_whatever_the_order_of_its_runs(tmp_path: Path) -> None:
    """The same seed run again draws nothing new: counted twice, it would make an interval narrower than it is."""
    begun(write_run(tmp_path, "old", "seed=0", ce=3.9), 1.0)
    begun(write_run(tmp_path, "new", "seed=0", ce=3.4), 3.0)
    begun(write_run(tmp_path, "begun", "seed=0", ce=None, status="stopped"), 4.0)
    begun(write_run(tmp_path, "other", "seed=1", ce=3.5), 2.0)
    for order in itertools.permutations(("old", "new", "begun", "other")):
        found = comparison(tmp_path, *order)
        assert found.groups[0].figure(CE.name) == pytest.approx(interval([3.4, 3.5]))
        assert any(text.startswith("old, new, begun are one job with one seed") for text in found.cautions)
    assert not any("one seed" in text for text in comparison(tmp_path, "new", "other").cautions)


def test_the_same_job_on_other_files_is_another_group(tmp_path: Path) -> None:
    for seed, inputs in enumerate(("11" * 16, "11" * 16, "22" * 16)):
        begun(write_run(tmp_path, f"r{seed}", f"seed={seed}", ce=3.4), seed, inputs=inputs)
    found = comparison(tmp_path, "r0", "r1", "r2")
    assert [(group.label, len(group.runs)) for group in found.groups] == [("inputs 11111111", 2), ("inputs 22222222", 1)]


# What may be said.


def seeds(folder: Path, first: Sequence[float], second: Sequence[float]) -> Comparison:
    for name, alpha, ces in (("a", 0, first), ("b", 1, second)):
        for seed, ce in enumerate(ces):
            write_run(folder, f"{name}{seed}", f"objective.alpha={alpha}", f"seed={seed}", ce=ce)
    return comparison(folder, *(f"{name}{seed}" for name in "ab" for seed in range(len(first))))


def test_a_difference_over_common_seeds_is_paired(tmp_path: Path) -> None:
    """Seeds move both jobs together, so means whose intervals overlap can still differ surely."""
    first, second = [3.30, 3.40, 3.50], [3.32, 3.421, 3.519]
    found = seeds(tmp_path, first, second)
    a, b = (group.figure(CE.name) for group in found.groups)
    assert a and b and a.ends[1] > b.ends[0], "the intervals overlap"
    half = interval([x - y for x, y in zip(first, second, strict=True)]).half
    text = finding(found)
    assert (
        text == f"alpha 0 has the lowest held-out cross entropy, 0.0200 ± {half:.4f} nats per token below alpha 1 over 3 seeds."
    )


def test_a_difference_that_seeds_explain_is_said_to_be_chance(tmp_path: Path) -> None:
    assert finding(seeds(tmp_path, [3.3, 3.5, 3.4], [3.5, 3.3, 3.41])).endswith("may be chance.")


def test_means_over_other_seeds_do_not_outweigh_the_common_ones(tmp_path: Path) -> None:
    seeds(tmp_path, [3.30, 3.31], [3.29, 3.30])
    write_run(tmp_path, "a2", "objective.alpha=0", "seed=2", ce=3.0)
    found = comparison(tmp_path, "a0", "a1", "a2", "b0", "b1")
    assert (
        finding(found)
        == "alpha 0 has the lowest held-out cross entropy on average, but not over the 2 seeds that alpha 1 has too."
    )


def test_nothing_is_best_on_other_heldout_rows(tmp_path: Path) -> None:
    write_run(tmp_path, "a", ce=3.4)
    write_run(tmp_path, "b", ce=3.3)
    assert comparison(tmp_path, "a", "b").incomparable == frozenset()
    write_run(tmp_path, "c", "data.seq_len=64", ce=3.2, data_key="77" * 16)
    found = comparison(tmp_path, "a", "c")
    assert found.best_runs(CE) == set() and "different held-out rows" in finding(found)
    assert any("not measured on the same held-out rows" in text for text in found.cautions)
    write_run(tmp_path, "d", "evaluate.rows=64", ce=3.2)
    assert comparison(tmp_path, "a", "d").best_runs(CE) == set()


def test_other_teachers_leave_cross_entropy_comparable(tmp_path: Path) -> None:
    write_run(tmp_path, "a", ce=3.4)
    write_run(tmp_path, "b", "teacher.train.steps=70", ce=3.3)
    found = comparison(tmp_path, "a", "b")
    assert found.best_runs(CE) == {"b"} and found.best_runs(BY_NAME["kl_to_teacher_nats"]) == set()


def test_a_seed_is_not_called_the_best_of_one_job(tmp_path: Path) -> None:
    write_run(tmp_path, "a", "seed=0", ce=3.4)
    write_run(tmp_path, "b", "seed=1", ce=3.3)
    found = comparison(tmp_path, "a", "b")
    assert found.best_runs(CE) == set() and finding(found).startswith("2 runs of one job: ")


# Runs that are not finished, or not there.


def test_a_run_that_holds_its_lock_is_running(tmp_path: Path) -> None:
    directory = write_run(tmp_path, "a", ce=None, status="running")
    with exclusive(directory / "lock"):
        assert read_runs([str(directory)])[0].status == "running"
    assert read_runs([str(directory)])[0].status == "killed"


@pytest.mark.parametrize("status", ["failed", "running", "stopped"])
def test_an_unfinished_run_gives_what_it_has(tmp_path: Path, status: str) -> None:
    write_run(tmp_path, "done", ce=3.4)
    write_run(tmp_path, "part", "objective.alpha=1", ce=None, status=status, steps=50)
    found = comparison(tmp_path, "done", "part")
    assert found.runs[1].figures == {} and len(found.runs[1].points) == len(found.runs[0].points) * 50 // STEPS
    assert any("Not finished: part" in text for text in found.cautions)
    shown = "killed" if status == "running" else status  # nobody holds its lock
    assert f"part ({shown})" in as_text(found, 80) and finding(found).startswith("1 of 2 runs")


def test_points_of_an_earlier_job_are_left_out(tmp_path: Path) -> None:
    directory = write_run(tmp_path, "a", ce=3.4)
    whole = len(read_runs(["a"], str(tmp_path / "store"))[0].points)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('...\n{"stage": "student:00000000", "step": 1, "time_s": 1.0, "metrics": {"train/ce_nats": 9.0}}\n')
    assert len(read_runs(["a"], str(tmp_path / "store"))[0].points) == whole > 0


def test_a_job_that_this_version_does_not_take_is_compared_as_written(tmp_path: Path) -> None:
    write_run(tmp_path, "new", ce=3.4)
    old = write_run(tmp_path, "old", ce=3.3)
    (old / "job.yaml").write_text((old / "job.yaml").read_text() + "retired_key: 3\n")
    assert comparison(tmp_path, "new", "old").differs == {"retired_key": ["–", 3]}


def test_a_run_is_found_by_directory_name_or_default_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_run(tmp_path, "a")
    shutil.copytree(tmp_path / "store", tmp_path / "distill-store")
    monkeypatch.chdir(tmp_path)
    assert find_run(str(directory)).address() == str(directory) == find_run("a", "store").address()
    assert find_run("store/runs/a").address() == str(directory)
    assert find_run("a").address() == str(tmp_path / "distill-store" / "runs" / "a")
    (tmp_path / "a").mkdir()
    assert find_run("a").address() == str(tmp_path / "distill-store" / "runs" / "a"), "a folder that is no run is passed over"


def test_a_run_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    write_run(tmp_path, "chat")
    storage = str(tmp_path / "store")
    with pytest.raises(SpecError, match=r"^nope: no such run; .*store holds chat; give a run directory"):
        read_runs(["chat", "nope"], storage)
    with pytest.raises(SpecError, match="holds no runs"):
        find_run("nope", str(tmp_path / "empty"))
    with pytest.raises(SpecError, match="given twice"):
        read_runs(["chat", str(tmp_path / "store" / "runs" / "chat")], storage)


def test_runs_of_one_name_in_two_storages_are_told_apart(tmp_path: Path) -> None:
    directories = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        directories.append(str(write_run(tmp_path / folder, "a", f"seed={len(directories)}")))
    assert [run.name for run in read_runs(directories)] == directories


# As text and data.


def test_the_table_turns_where_it_would_be_too_wide() -> None:
    rows = [["run", "first", "second", "third"], ["a", "1", "2", "3"]]
    assert aligned(rows, 80).split("\n")[0].split() == rows[0]
    assert aligned(rows, 12).split("\n")[0].split() == ["run", "a"]


def test_text_and_data_say_the_same(tmp_path: Path) -> None:
    found = seeds(tmp_path, [3.30, 3.31], [3.41, 3.42])
    data, text = as_dict(found), as_text(found, 200)
    assert data["differs"] == ["seed", "objective.alpha"] and data["best"]["heldout_ce_nats"] == ["a0"]
    assert data["groups"][1]["figures"]["heldout_ce_nats"]["n"] == 2
    line = next(line for line in text.split("\n") if line.startswith("a0 "))
    assert line.split()[1:4] == ["0", "0", "3.3000*"]
    assert "3.3050 ± 0.0635*" in text
