"""The report: what stands in its files, what it claims, and that its page loads nothing and runs nobody's text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report.build import verdict
from orchestrator.report.charts import charts
from orchestrator.report.charts.figure import Curve, end_labels
from orchestrator.report.facts import SPEEDS, hardware_rows
from orchestrator.report.text import shown
from orchestrator.report.words import nats, percent, seconds, short, size, visible
from tests.reports import small_points, small_report, small_samples, whole_report, write_report

EVIL = "</script><script>alert(1)</script>"
DRAWN = ["ce", "loss", "heldout_ce", "heldout_kl", "learning_rate", "grad_norm", "kl", "agreement", "timeline"]


class _Page(HTMLParser):
    """The attributes, the visible text and the number of scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.shown: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]
        self._in_script = tag in ("script", "style")
        if tag == "script":
            self.scripts.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if not self._in_script:
            self.shown.append(data)

    @property
    def spaced(self) -> str:
        """With a space between elements."""
        return " ".join(" ".join(self.shown).split())

    @property
    def text(self) -> str:
        return " ".join("".join(self.shown).split())


def _written(
    tmp_path: Path,
    report: dict[str, Any],
    points: list[dict[str, Any]],
    job: str = "name: tiny\n",
    samples: list[list[dict[str, Any]]] | None = None,
):
    paths = write_report(tmp_path, report, points, samples or [], job)
    assert [p.name for p in paths] == ["report.json", "report.html", "summary.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
    data, page, summary = (p.read_text() for p in paths)
    return json.loads(data), page, summary


def test_report_json_holds_the_contract(tmp_path: Path) -> None:
    report = small_report()
    data, _, _ = _written(tmp_path, report, small_points())
    assert data == report
    text = (tmp_path / "report.json").read_text()
    assert text == json.dumps(report, indent=2, sort_keys=True) + "\n"


def test_page_shows_the_figures_and_loads_nothing(tmp_path: Path) -> None:
    _, page, _ = _written(tmp_path, small_report(), small_points())
    parsed = _Page(page)
    assert parsed.links == ["data:,", small_report()["tracking"]]
    assert not re.search(r"url\(|@import", page.split("</style>")[0])
    assert "default-src 'none'" in page
    assert len(parsed.scripts) == 3 and page.count("Plotly.react(") >= 1
    for text in (
        "recovers 25 % of the gap",
        "3.3750",
        "268 M",
        "62.8 MB",
        "18.2 k",
        "sampled",
        "7c1e2fdb0c5f",
        "The ledger balances",
    ):
        assert text in parsed.text, text


def test_users_text_stays_text(tmp_path: Path, seed: int) -> None:
    report = whole_report(seed) | {"name": EVIL, "versions": {EVIL: EVIL}}
    report["stages"][0]["stage"] = report["faults"][0]["text"] = EVIL
    points = small_points()
    points[0]["metrics"][f"train/{EVIL}_nats"] = 1.0
    _, page, summary = _written(tmp_path, report, points, f"name: {EVIL}\n", small_samples(EVIL))
    assert EVIL not in page and EVIL not in summary
    parsed = _Page(page)
    assert len(parsed.scripts) == 3
    assert parsed.text.count(EVIL) >= 20


def test_invisible_characters_of_samples_are_shown_as_codes(tmp_path: Path, seed: int) -> None:
    hostile = "a\x00\x1b[31m\u202eb\u200b\ufeff\n\x85"
    _, page, _ = _written(tmp_path, whole_report(seed), small_points(), samples=small_samples(hostile))
    assert not set("\x00\x1b\u202e\u200b\ufeff\x85") & set(page.split("<script>")[0])
    text = _Page(page).text
    assert r"a\u0000\u001b[31m\u202eb\u200b\ufeff↵ \u0085" in text
    assert r"“a\u0000\u001b[31m\u202eb\u200b\ufeff↵\u0085” 50 %" in text


def test_page_is_small_however_long_the_run(tmp_path: Path, seed: int) -> None:
    """Fault of kind: a report of megabytes, most of them a library of which a tenth is used."""
    write_report(tmp_path, whole_report(seed), small_points(20_000), small_samples(), "name: tiny\n")
    assert (tmp_path / "report.html").stat().st_size <= 1_000_000


def test_summary_is_markdown_and_has_no_html_in_it(tmp_path: Path) -> None:
    """Fault of kind: text escaped for another format than the one it stands in."""
    fault = {"attempt": 1, "time_s": 1.0, "text": "the student's <unk> | `x`"}
    _, page, summary = _written(tmp_path, small_report() | {"name": "a&b", "faults": [fault]}, small_points())
    assert "the student's \\<unk\\> \\| \\`x\\`" in summary and "# a&b\n" in summary
    assert "the student&#39;s &lt;unk&gt; | `x`" in page and "a&amp;b" in page


def test_run_without_baseline_or_points(tmp_path: Path) -> None:
    report = small_report(baseline=None)
    report["throughput"] = dict.fromkeys(report["throughput"])
    report["stages"] = [{"stage": "student", "status": "reused", "started_s": 0.0, "seconds": 0.0}]
    data, page, summary = _written(tmp_path, report, [])
    assert data["baseline"] is None and data["gap_recovered"] is None
    parsed = _Page(page)
    assert parsed.scripts == [] and len(page) < 100_000
    assert "without a baseline" in parsed.text and "Every stage was reused" in parsed.text
    assert "| baseline |" not in summary and "Gap recovered: –" in summary


def test_summary_has_the_figures(tmp_path: Path) -> None:
    _, _, summary = _written(tmp_path, small_report(), small_points())
    for text in (
        "# tiny\n\nThe student recovers 25 % of the gap",
        "| student | 3.3750 | 29.22 | 40.0 % | 31.4 M | 31.4 M | 62.8 MB | 1,234 |",
        "KL to teacher: 0.1432 nats per token; same top-1 token: 69 %; ECE: 2.1 %",
        "sampled, 64 rows in 4 shards (0 reused), 10.0 kB, 72.4 bytes per token",
        "64 planned, 64 committed, 0 quarantined, 0 duplicates",
        "teacher labels 18,210 tokens/s (waiting 4.0 %), student trains 26,750 tokens/s (waiting 31 %)",
        "1 min 01 s in all, first student step after 4.5 s",
        "| student | ran | 40 s |",
        "Faults: none",
    ):
        assert text in summary, text


def test_values_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    points = small_points()
    points[4]["metrics"]["train/ce_nats"] = math.nan
    data, page, _ = _written(tmp_path, small_report(student=math.nan), points)
    assert data["student"]["heldout_ce_nats"] is None
    assert "no finite held-out cross entropy" in page
    figures = re.search(r'id="figures">(.*?)</script>', page)
    assert figures and "NaN" not in figures[1] and json.loads(figures[1])["ce"]


def test_rewriting_replaces_the_files(tmp_path: Path) -> None:
    _written(tmp_path, small_report(), [])
    data, _, summary = _written(tmp_path, small_report() | {"seed": 8}, [])
    assert data["seed"] == 8 and "Seed 8" in summary


@pytest.mark.parametrize(
    ("student", "baseline", "teacher", "says"),
    [
        (3.375, 3.4, 3.3, "recovers 25 % of the gap"),
        (3.3995, 3.4, 3.3, "recovers 0.5 % of the gap"),
        (3.25, 3.4, 3.3, "better than its teacher"),
        (3.45, 3.4, 3.3, "did not help in this run: the student is 0.050 nats per token worse"),
        (3.35, 3.3, 3.3, "no gap to recover"),
        (3.25, 3.3, 3.4, "no gap to recover"),
        (3.35, 3.29, 3.3, "no gap to recover"),
        (3.4, None, 3.3, "0.100 nats per token above its teacher; without a baseline"),
        (3.2, None, 3.3, "0.100 nats per token below its teacher; without a baseline"),
    ],
)
def test_verdict_claims_what_was_measured(student: float, baseline: float | None, teacher: float, says: str) -> None:
    assert says in verdict(small_report(student, baseline, teacher))


@pytest.mark.parametrize("missing", [("teacher",), ("baseline",), ("teacher", "baseline")])
def test_models_that_could_not_be_measured_cost_no_page(tmp_path: Path, missing: tuple[str, ...]) -> None:
    report = small_report() | dict.fromkeys((*missing, "gap_recovered", "gap_recovered_interval")) | {"heldout": {}}
    if "teacher" in missing:
        report["student"] = {k: v for k, v in report["student"].items() if k not in ("kl_to_teacher_nats", "top1_agreement")}
    report["generated"] = [{"prompt": "def f(x):", "student": " return"}]
    data, page, summary = _written(tmp_path, report, small_points())
    assert data["student"]["heldout_ce_nats"] == 3.375 and all(data[name] is None for name in missing)
    assert f"no {'baseline' if 'baseline' in missing else 'teacher'} was measured" in page and "3.3750" in summary
    assert "The teacher is left out" in page
    says = "says nothing on quality" if "teacher" in missing else "without a baseline"
    assert says in verdict(data)


def test_figures_of_a_teacher_that_told_its_top_ids_are_called_bounds(tmp_path: Path, seed: int) -> None:
    report = whole_report(seed)
    _, page, summary = _written(tmp_path, report, small_points())
    assert "nats per token at least" not in summary and "lower bounds, over those ids" not in page
    report["heldout"]["teacher_ids"] = 50
    _, page, summary = _written(tmp_path, report, small_points())
    assert "nats per token at least" in summary and "nats per token, at least" in page
    assert "The teacher told its 50 most likely ids alone: these are lower bounds" in page


def test_unbalanced_ledger_is_said(tmp_path: Path) -> None:
    report = small_report() | {"ledger": {"planned": 64, "committed": 60, "quarantined": 0, "duplicates": 0}}
    _, page, summary = _written(tmp_path, report, [])
    assert "The ledger does not balance" in page and "The ledger does not balance" in summary


def test_figures_are_valid_plotly(seed: int) -> None:
    objects = pytest.importorskip("plotly.graph_objects")
    figures = charts(whole_report(seed), small_points())
    assert list(figures) == DRAWN
    for chart in figures.values():
        painted = re.sub(r'"\$\w+"', '"#123456"', json.dumps(chart.figure))
        objects.Figure(json.loads(painted))


def test_last_point_of_a_step_counts_and_long_runs_are_thinned() -> None:
    again = {"stage": "student", "step": 3, "time_s": 9.0, "metrics": {"train/ce_nats": 1.0}}
    student = next(t for t in charts(small_report(), [*small_points(), again])["ce"].figure["data"] if t["name"] == "student")
    assert student["y"][3] == 1.0 and len(student["y"]) == 20
    student = next(t for t in charts(small_report(), small_points(5000))["ce"].figure["data"] if t["name"] == "student")
    assert 300 <= len(student["x"]) <= 600 and student["y"][-1] == pytest.approx(3.0, abs=0.05)


def test_long_teacher_run_is_shown_by_its_held_out_value() -> None:
    teacher = [{"stage": "teacher", "step": s, "time_s": s, "metrics": {"train/ce_nats": 3.0}} for s in range(100)]
    names = [t["name"] for t in charts(small_report(), [*small_points(), *teacher])["ce"].figure["data"] if "name" in t]
    assert "teacher, held out" in names and "teacher" not in names


def test_reused_stage_has_no_throughput_curve() -> None:
    report = small_report()
    report["stages"][2]["status"] = "reused"
    names = [t["name"] for t in charts(report, small_points())["timeline"].figure["data"] if t["type"] == "scatter"]
    assert names == ["teacher labels", "baseline trains"]


def test_numbers_in_words() -> None:
    assert [short(v) for v in (None, 0, 12, 999, 1500, 268_098_176, 999_960)] == [
        "–", "0", "12", "999", "1.50 k", "268 M", "1.00 M"
    ]  # fmt: skip
    assert [size(v) for v in (1, 62_800_000)] == ["1 B", "62.8 MB"]
    assert [percent(v) for v in (0, 0.004, 0.25, 0.997, 1, -0.26)] == ["0 %", "0.4 %", "25 %", "99.7 %", "100 %", "−26 %"]
    assert [seconds(s) for s in (0.44, 42, 59.9, 185, 7800)] == ["0.4 s", "42 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"]
    assert [nats(v) for v in (None, 0.00123, 0.254, 3.14, 12.3)] == ["–", "0.0012", "0.25", "3.1", "12"]
    assert visible("é\t\n\x7f") == "é⇥↵\\u007f"


def test_faults_are_listed_with_their_attempt(tmp_path: Path, seed: int) -> None:
    report = whole_report(seed)
    _, page, summary = _written(tmp_path, report, small_points())
    assert ">12 s in</td>" in page and ">student: a training worker died; retry 1/3</td>" in page
    assert "- attempt 1, 12 s in: student: a training worker died; retry 1/3" in summary
    report |= {"attempt": 2, "faults": [*report["faults"], {"attempt": 2, "time_s": 0.0, "text": "attempt 1 was killed"}]}
    data, page, _ = _written(tmp_path, report, small_points())
    assert "attempt 1, 12 s in" in page and "attempt 2, 0.0 s in" in page and data["faults"] == report["faults"]
    _, page, summary = _written(tmp_path, report | {"faults": []}, small_points())
    assert "None: no restart" in page and "Faults: none" in summary


def test_steps_that_were_left_out_are_listed_with_their_rows(tmp_path: Path, seed: int) -> None:
    report = whole_report(seed)
    _, page, summary = _written(tmp_path, report, small_points())
    assert "left out" not in page.lower() and "left out" not in summary
    by_loss, by_gradient = {"step": 12, "loss": "nan", "rows": ["3:5", "3:6"]}, {"step": 14, "loss": "2.5", "rows": []}
    data, page, summary = _written(tmp_path, report | {"left_out": {"student": [by_loss, by_gradient]}}, small_points())
    assert data["left_out"] == {"student": [by_loss, by_gradient]}
    assert "<td>12</td><td>nan</td><td>3:5 3:6</td>" in page and "<td>14</td><td>2.5</td><td>all losses finite" in page
    assert "- student, step 12, loss nan: rows 3:5 3:6" in summary


def test_shades_follow_the_quantiles_of_all_tokens(seed: int) -> None:
    quantiles = whole_report(seed)["heldout"]["kl_quantiles"]["student"]
    tokens = [small_samples()[0][0] | {"kl_nats": v} for v in (0.0, *(q * 1.001 for q in quantiles.values()))]
    found = shown(tokens, quantiles)
    assert [t["shade"] for t in found["tokens"]] == [0, 1, 2, 3, 4]
    assert [t["shade"] for t in found["farthest"]] == [4, 3, 2, 1, 0]


def test_verdict_and_figure_do_not_contradict_each_other(tmp_path: Path) -> None:
    """Fault of kind: two sentences of one summary that cannot both be true."""
    report = small_report(student=3.2998, baseline=3.2, teacher=3.3)
    assert report["gap_recovered"] is not None
    _, page, summary = _written(tmp_path, report, [])
    assert "There is no gap to recover" in summary and "- Gap recovered: –\n" in summary
    assert "There is no gap to recover" in page and "<dd>–<small>no gap to recover</small>" in page


def test_gap_is_shown_with_its_interval_or_not_at_all(tmp_path: Path) -> None:
    report = small_report() | {"gap_recovered_interval": [-0.02, 0.31]}
    _, page, summary = _written(tmp_path, report, [])
    assert "recovers 25 % (95 % interval −2.0 % to 31 %) of the gap" in summary and "−2.0 % to 31 % over held-out" in summary
    assert "95 % interval −2.0 % to 31 %</small>" in page
    assert "too little for these held-out documents to tell" in verdict(report | {"gap_recovered_interval": None})


def test_facts_of_the_run_are_shown(tmp_path: Path, seed: int) -> None:
    _, page, summary = _written(tmp_path, whole_report(seed), small_points())
    text = _Page(page).spaced
    for fact in (
        "distill run /data/runs/tiny/job.yaml",
        "http://localhost:5000/#/experiments/1/runs/abc",
        "16 cores, 137 GB, 1 × H200",
    ):
        assert fact in text and fact in summary, fact
    for row in ("documents 321", "dropped tokens 57", "rows to train on 64 of 128 tokens", "3.355 to 3.395", "18 % to 31 %"):
        assert row in text, row
    assert "student 20 15 160 64 2.50 20,480 26,750 31 % 1.42 GB" in text
    assert "20 steps, 160 rows read (2.50 passes), 20,480 tokens" in summary
    assert SPEEDS in text and f"\n\n{SPEEDS}\n\n" in summary


def test_alike_machines_share_a_line() -> None:
    gpu = {"node": "a", "cores": 16, "memory_bytes": 128_000_000_000, "gpus": ["H200", "H200"]}
    nodes = [gpu, gpu | {"node": "b"}, {"node": "c", "cores": 1, "memory_bytes": 4_000_000_000, "gpus": []}]
    assert hardware_rows({"hardware": nodes}) == [
        ("2 machines, each", "16 cores, 128 GB, 2 × H200"),
        ("1 machine", "1 core, 4.00 GB"),
    ]


def test_continuations_stand_side_by_side(tmp_path: Path, seed: int) -> None:
    report = whole_report(seed)
    _, page, summary = _written(tmp_path, report, small_points())
    text = _Page(page).spaced
    assert "def f(x): teacher return x + 1 student return x baseline nothing: it ends the text" in text
    assert "| The student's | teacher \\<b\\> | teacher | the the |" in summary
    report["generated"][0]["student"] = report["generated"][1]["student"] = None
    _, page, summary = _written(tmp_path, report, small_points())
    assert "student failed: see the faults baseline" in _Page(page).spaced and "(failed) |" in summary
    for entry in report["generated"]:
        del entry["teacher"]
    _, page, summary = _written(tmp_path, report, small_points())
    assert "The teacher is left out" in page and "| prompt | student | baseline |" in summary


@pytest.mark.parametrize("name", ["ce", "loss", "timeline"])
def test_names_of_lines_stand_where_no_line_is_drawn(name: str, seed: int) -> None:
    """Fault of kind: the name of a line that ends early, overprinted by those that go on."""
    labels = [a for a in charts(whole_report(seed), small_points())[name].figure["layout"]["annotations"] if a["yref"] != "y2"]
    assert labels and all(a["xref"] == "paper" and a["x"] == 1 and a["xanchor"] == "left" for a in labels)


def test_names_of_lines_do_not_overlap_nor_leave_the_figure() -> None:
    ends = [3.9, 3.95, 3.96, 4.0]
    curves = [Curve(str(y), "$text", "solid", [0, 1], [], [0, y]) for y in ends]
    labels = end_labels(curves, 0.0, 4.0, 200.0, "y")
    places = [y / 4.0 * 200 + label["yshift"] for y, label in zip(ends, labels, strict=True)]
    assert places[-1] == 200 and all(b - a >= 17 for a, b in pairwise(places))
