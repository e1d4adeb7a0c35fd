"""The comparison page as a browser draws it, from run directories in a storage."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.compare.charts import charts, swept
from orchestrator.compare.groups import Comparison, compared
from orchestrator.compare.page import page, write_page
from orchestrator.compare.read import read_runs
from tests.past_runs import STEPS, write_run
from tests.unit import test_page

browser = test_page.browser

ALPHAS, SEEDS = (0.0, 0.1, 1.0), (0, 1, 2)
HOSTILE = "</script><script>document.title='owned'</script><b>$run-1"


def ce_of(alpha: float, seed: int) -> float:
    return 3.3 + 0.1 * alpha + 0.01 * seed * (1 + alpha)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three values of alpha, three seeds each."""
    folder = tmp_path_factory.mktemp("compared")
    names = []
    for alpha in ALPHAS:
        for seed in SEEDS:
            names.append(f"run-{len(names) + 1}")
            write_run(folder, names[-1], f"objective.alpha={alpha}", f"seed={seed}", ce=ce_of(alpha, seed))
    return compared(read_runs(names, str(folder / "store")))


@pytest.fixture(scope="module")
def drawn(browser: str, comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("page")
    return test_page.opened(browser, write_page(comparison, folder / "compare.html"), folder)


def test_the_page_is_drawn_and_nothing_fails(drawn: dict[str, Any], comparison: Comparison) -> None:
    assert drawn["failures"] == []
    assert list(drawn["charts"]) == ["reached", "gap", "heldout", "ce"], "losses of other mixtures are not drawn"
    assert len(page(comparison).encode()) < 1_000_000


def test_marks_lie_at_the_means_and_bars_reach_as_far_as_the_intervals(drawn: dict[str, Any]) -> None:
    traces = drawn["charts"]["reached"]["traces"]
    line, *dots = traces
    means = [float(np.mean([ce_of(alpha, seed) for seed in SEEDS])) for alpha in ALPHAS]
    assert line["x"] == list(ALPHAS) and line["y"] == pytest.approx(means)
    strong = [trace for trace in dots if len(trace["x"]) == 1]
    assert [(t["name"], t["x"][0]) for t in strong] == [("alpha 0", 0.0), ("alpha 0.1", 0.1), ("alpha 1", 1.0)]
    assert [trace["y"][0] for trace in strong] == pytest.approx(means)
    centres = [marks[0][1] + marks[0][3] / 2 for marks in drawn["charts"]["reached"]["marks"] if len(marks) == 1]
    assert np.corrcoef(centres, means)[0, 1] == pytest.approx(-1, abs=1e-3), "higher values are higher up"


def test_error_bars_are_the_t_intervals(comparison: Comparison) -> None:
    figure = charts(comparison)["reached"].figure
    halves = [trace["error_y"]["array"][0] for trace in figure["data"] if "error_y" in trace]
    for alpha, half in zip(ALPHAS, halves, strict=True):
        values = [ce_of(alpha, seed) for seed in SEEDS]
        assert half == pytest.approx(4.3027 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-4)


def test_a_course_is_the_mean_of_its_seeds_which_lie_faintly_behind(comparison: Comparison) -> None:
    figure = charts(comparison)["heldout"].figure
    faint = [trace for trace in figure["data"] if "opacity" in trace]
    strong = [trace for trace in figure["data"] if "opacity" not in trace]
    assert len(faint) == len(ALPHAS) * len(SEEDS) and len(strong) == len(ALPHAS)
    assert strong[0]["x"] == [float(step) for step in range(19, STEPS, 20)]
    assert strong[0]["y"] == pytest.approx(np.mean([trace["y"] for trace in faint[:3]], axis=0))


def test_without_a_baseline_there_is_the_kl_to_the_teacher(tmp_path: Path) -> None:
    for i, alpha in enumerate((0, 1)):
        directory = write_run(tmp_path, f"r{i}", f"objective.alpha={alpha}", ce=3.3 + i / 10)
        report = json.loads((directory / "report.json").read_text())
        (directory / "report.json").write_text(json.dumps(report | {"gap_recovered": None, "baseline": None}))
    found = charts(compared(read_runs(["r0", "r1"], str(tmp_path / "store"))))
    assert list(found) == ["reached", "kl", "heldout", "ce"]
    assert found["kl"].rows == [["alpha 0", "0.0500", "–", "–", "1"], ["alpha 1", "0.1000", "–", "–", "1"]]


def test_the_axis_of_a_learning_rate_is_logarithmic(tmp_path: Path) -> None:
    for i, rate in enumerate((1e-4, 1e-3, 1e-2)):
        write_run(tmp_path, f"r{i}", f"train.learning_rate={rate}", ce=3.3 + i / 10)
    found = compared(read_runs(["r0", "r1", "r2"], str(tmp_path / "store")))
    assert swept(found.groups) == ("train.learning_rate", [1e-4, 1e-3, 1e-2], [""] * 3)
    axis = charts(found)["reached"].figure["layout"]["xaxis"]
    assert axis["type"] == "log" and axis["range"][0] < -4 and axis["range"][1] > -2


def test_runs_that_differ_in_several_things_get_no_dots_but_all_curves(tmp_path: Path) -> None:
    write_run(tmp_path, "a", ce=3.4)
    write_run(tmp_path, "b", "labels={kind: topk, k: 20}", "train.steps=300", ce=3.3)
    write_run(tmp_path, "c", "objective.alpha=0.5", ce=None, status="failed", steps=40)
    found = compared(read_runs(["a", "b", "c"], str(tmp_path / "store")))
    drawn = charts(found)
    assert list(drawn) == ["heldout", "ce"] and len(drawn["ce"].figure["data"]) == 3
    assert drawn["ce"].rows[0][0] == "0" and drawn["ce"].head == ["step", "a", "b", "c"]
    text = page(found)
    assert "not finished: failed" in text and "<code>train.steps</code>" in text


def test_what_differs_cannot_become_markup(browser: str, tmp_path: Path) -> None:
    for i, value in enumerate((HOSTILE, "plain")):
        write_run(
            tmp_path,
            f"r{i}",
            f"tracking.experiment={json.dumps(value)}",
            f"data.source={{kind: text, paths: [{json.dumps(value)}]}}",
        )
    found = compared(read_runs(["r0", "r1"], str(tmp_path / "store")))
    text = page(found)
    assert "<script>document" not in text and "</script><script>document" not in text
    assert "&lt;/script&gt;" in text
    drawn = test_page.opened(browser, write_page(found, tmp_path / "page.html"), tmp_path)
    assert drawn["failures"] == [] and "ce" in drawn["charts"]


def test_best_is_marked_once_in_each_column(comparison: Comparison) -> None:
    seeds, runs = re.findall(r'<table class="runs">.*?</table>', page(comparison), re.DOTALL)
    for table in (seeds, runs):
        assert len(re.findall('class="best"', table)) == 5, "tokens/s and label bytes are equal, wall time has no better side"
    assert re.search(r"run-1</?[^>]*>.*?class=\"best\">3\.3000", runs, re.DOTALL)


def test_a_grid_of_two_keys_makes_a_line_for_each_value_of_the_other(tmp_path: Path) -> None:
    cases = [(rate, k) for k in (8, 16) for rate in (1e-3, 1e-4, 1e-2)]
    for i, (rate, k) in enumerate(cases):
        write_run(tmp_path, f"r{i}", f"train.learning_rate={rate}", f"labels={{kind: topk, k: {k}}}", ce=3.3 + i / 10)
    found = compared(read_runs([f"r{i}" for i in range(6)], str(tmp_path / "store")))
    figure = charts(found)["reached"].figure
    lines = [(t["x"], t["y"]) for t in figure["data"] if t["mode"] == "lines"]
    assert [x for x, _ in lines] == [[1e-4, 1e-3, 1e-2]] * 2
    assert [y for _, y in lines] == [pytest.approx([3.4, 3.3, 3.5]), pytest.approx([3.7, 3.6, 3.8])]
    assert [(a["text"], a["x"]) for a in figure["layout"]["annotations"]] == [("k 8", -2.0), ("k 16", -2.0)]


def test_a_mean_goes_as_far_as_the_shortest_of_long_courses(tmp_path: Path) -> None:
    """Courses of more than 600 points are thinned, by buckets that depend on their length."""
    for seed, steps in enumerate((1500, 900)):
        write_run(tmp_path, f"r{seed}", f"seed={seed}", ce=None if seed else 3.4, status="running", steps=steps)
    write_run(tmp_path, "other", "objective.alpha=1", steps=1500)
    figure = charts(compared(read_runs(["r0", "r1", "other"], str(tmp_path / "store"))))["ce"].figure
    mean = next(trace for trace in figure["data"] if "opacity" not in trace)
    assert 890 <= mean["x"][-1] < 900 and len(mean["x"]) > 400
    assert mean["y"][-1] == pytest.approx((3.4 + 3.5) / 2 - 0.1, abs=0.05)
