"""The report as a browser draws it: what stands on the page, at which place, against what stands in report.json."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.report.charts.timeline import binned
from orchestrator.report.timeline import lanes
from tests.reports import STEPS, TOKENS, small_points, small_samples, whole_report, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FIRST = """<script>
const failures = [];
addEventListener("error", e => failures.push(e.message));
addEventListener("unhandledrejection", e => failures.push(e.reason.message));
document.addEventListener("securitypolicyviolation", e => failures.push(e.violatedDirective + " " + e.blockedURI));
</script>"""
LAST = """<script>
setTimeout(() => {
  const box = e => { const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; };
  const found = {failures, charts: {}, tokens: [], texts: []};
  for (const chart of document.querySelectorAll(".chart")) {
    if (!chart.data) { found.texts.push(chart.textContent); continue; }
    found.charts[chart.id.slice(6)] = {
      traces: chart.data.map(({type, name, x, y, customdata}) => ({type, name, x, y, customdata})),
      bars: [...chart.querySelectorAll(".barlayer .trace")].map(t => [...t.querySelectorAll(".point path")].map(box)),
      lines: chart.querySelectorAll(".scatterlayer .js-line").length,
      marks: [...chart.querySelectorAll(".scatterlayer .trace")].map(t => [...t.querySelectorAll("path.point")].map(box)),
    };
  }
  for (const token of document.querySelectorAll(".sample pre > span")) {
    token.focus();
    found.tokens.push([token.className, token.firstChild.data, box(token.querySelector(".tip"))[3]]);
  }
  document.body.innerHTML = "<pre id=probe></pre>";
  document.getElementById("probe").textContent = JSON.stringify(found);
}, 500);
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    return found


def opened(browser: str, page: Path, folder: Path) -> dict[str, Any]:
    """What `LAST` found on `page`."""
    text = page.read_text()
    assert text.count("<head>") == text.count("</body>") == 1, "the scripts below would be put in twice"
    probed = folder / "probed.html"
    probed.write_text(text.replace("<head>", "<head>" + FIRST).replace("</body>", LAST + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000", "--virtual-time-budget=10000"]
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", probed.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    probe = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout, re.DOTALL)
    assert probe, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(html.unescape(probe[1]))


@pytest.fixture(scope="module")
def drawn(browser: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """report.json, and what the browser made of the page beside it."""
    folder = tmp_path_factory.mktemp("page")
    write_report(folder, whole_report(seed=0), small_points(), small_samples(), "name: tiny\n")
    return json.loads((folder / "report.json").read_text()), opened(browser, folder / "report.html", folder)


def traces(chart: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in chart["traces"] if "name" in trace}


def test_every_chart_is_drawn_and_nothing_fails(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, page = drawn
    assert page["failures"] == []
    assert list(page["charts"]) == [
        *("ce", "heldout_ce", "heldout_kl", "loss", "learning_rate", "grad_norm", "kl", "agreement", "timeline")
    ]
    assert page["charts"]["ce"]["lines"] >= 4 and page["charts"]["loss"]["lines"] >= 2
    assert len(traces(page["charts"]["ce"])["student"]["x"]) == STEPS


def test_kl_bars_are_as_high_as_the_histogram_says(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    report, page = drawn
    histogram, chart = report["heldout"]["kl_histogram"], page["charts"]["kl"]
    assert sum(histogram["student"]) == sum(histogram["baseline"]) == report["heldout"]["tokens"] == TOKENS
    for model in ("student", "baseline"):
        assert traces(chart)[model]["y"] == histogram[model]
    (bars,) = chart["bars"]
    counts = np.array([c for c in histogram["student"] if c])
    heights = np.array([height for *_, height in bars if height > 0])
    assert heights == pytest.approx(counts * heights.max() / counts.max(), abs=1.5) and heights.max() > 100
    lefts = [x for x, _, _, height in bars if height > 0]
    assert lefts == sorted(lefts) and chart["lines"] == 1


def test_agreement_marks_lie_where_the_values_are(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    report, page = drawn
    bins, chart = report["heldout"]["by_teacher_entropy"], page["charts"]["agreement"]
    assert sum(bins["tokens"]) == TOKENS
    names = [trace["name"] for trace in chart["traces"]]
    places = {name: np.array(marks) for name, marks in zip(names, chart["marks"], strict=True)}
    x = np.array([bins["entropy_nats"]] * 2).ravel()
    y = np.array([bins[name]["top1_agreement"] for name in names]).ravel()
    boxes = np.concatenate([places[name] for name in names])
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    assert len(centres) == len(x) == 2 * len(bins["tokens"])
    for values, pixels, sign in ((x, centres[:, 0], 1), (y, centres[:, 1], -1)):
        slope, offset = np.polyfit(values, pixels, 1)
        assert pixels == pytest.approx(slope * values + offset, abs=1.0) and slope * sign > 0


def test_timeline_shows_the_shares_of_each_side(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    report, page = drawn
    chart = page["charts"]["timeline"]
    found = traces(chart)
    drawn_bars = dict(zip([t["name"] for t in chart["traces"] if t["type"] == "bar"], chart["bars"], strict=True))
    widths = [width for _, _, width, _ in drawn_bars["stages"] if width > 0]
    assert widths == pytest.approx([widths[0], widths[0] * 40 / 18], abs=1.5), "labels took 18 s, the student 40 s"
    assert len(chart["marks"][-1]) == len(report["faults"]) == 1
    sides = lanes(report["stages"], small_points())
    assert [lane.stage for lane in sides] == ["labels", "student"] == list(report["timeline"])
    for lane in sides:
        left = found[f"{lane.stage} busy"]["x"]
        edges, *_ = binned(lane.spans, left[1] - left[0])
        _, _, _, row_height = drawn_bars[f"{lane.stage} starts up"][0]
        for kind in ("busy", "waiting"):
            shares = np.array(found[f"{lane.stage} {kind}"]["customdata"])
            seconds = report["timeline"][lane.stage][f"{kind}_s"]
            assert shares @ np.diff(edges) == pytest.approx(seconds, rel=0.02), (lane.stage, kind)
            heights = np.array([height for *_, height in drawn_bars[f"{lane.stage} {kind}"] if height > 0])
            assert heights == pytest.approx(row_height * shares[shares > 0], abs=1.5), (lane.stage, kind)


def test_every_token_of_a_sample_can_be_pointed_at(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, page = drawn
    assert len(page["tokens"]) == 8
    assert [text for _, text, _ in page["tokens"][:4]] == [" the", "·", "é", "↵\n⇥if"]
    assert page["tokens"][3][0] == "far-4" and page["tokens"][0][0] == "far-0"
    assert all(height > 50 for *_, height in page["tokens"])


def test_a_page_that_fails_is_noticed(browser: str, tmp_path: Path) -> None:
    write_report(tmp_path, whole_report(seed=0), small_points(), [], "name: tiny\n")
    page = tmp_path / "report.html"
    page.write_text(
        page.read_text().replace("draw(document.documentElement);", "draw(document.documentElement); nothing();", 1)
    )
    page.write_text(page.read_text().replace("</main>", '<img src="https://example.org/x.png"></main>'))
    failures = opened(browser, page, tmp_path)["failures"]
    assert any("nothing is not defined" in f for f in failures) and any("example.org" in f for f in failures)


def test_a_browser_without_decompression_is_pointed_to_the_tables(browser: str, tmp_path: Path) -> None:
    write_report(tmp_path, whole_report(seed=0), small_points(), [], "name: tiny\n")
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("<head>", "<head><script>delete window.DecompressionStream;</script>", 1))
    found = opened(browser, page, tmp_path)
    assert found["charts"] == {} and found["failures"] == []
    assert len(found["texts"]) == 9 and set(found["texts"]) == {
        "This browser is too old to unpack the charts; their numbers are below."
    }
