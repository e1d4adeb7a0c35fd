"""Writes what a run leaves for its readers: `report.json`, and `report.html` and `summary.md` that are drawn from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.report import facts, words
from orchestrator.report.charts import charts
from orchestrator.report.charts.figure import MODELS
from orchestrator.report.page import plotly_script, script_json, templates
from orchestrator.report.text import shown
from orchestrator.report.words import percent
from orchestrator.store.local import LocalStore
from orchestrator.tracking.figures import recovered

FIGURES = "report.json"
_FIELDS = ("params", "active_params", "heldout_ce_nats", "heldout_ppl", "top1_accuracy", "tokens_per_s", "size_bytes")


def write_figures(run_dir: Path, report: dict[str, Any]) -> Path:
    """Write report.json into `run_dir`, whole or not at all, and return its path; `report` follows its contract."""
    text = json.dumps(_finite(report), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    store = LocalStore(run_dir)
    store.replace(FIGURES, text.encode())
    return store.path(FIGURES)


def write_pages(
    run_dir: Path,
    report: dict[str, Any],
    points: list[dict[str, Any]],
    samples: Sequence[Sequence[dict[str, Any]]],
    job_yaml: str,
) -> list[Path]:
    """Write report.html and summary.md into `run_dir`, each whole or not at all, and return their paths.

    `report` follows the report.json contract, with `name` and `stages` besides; `points` are the run's metric points,
    their `time_s` and the stages' `started_s` both counted from the start of the run; `samples` are texts,
    each a list of `evaluate.samples.SampleToken` as dictionaries.
    """
    report = _finite(report)
    context = _context(report)
    drawn = charts(report, _finite(points))
    figures = {name: chart.figure for name, chart in drawn.items()}
    environment = templates()
    page, summary = (environment.get_template(name) for name in ("report.html.j2", "summary.md.j2"))
    files = {
        "report.html": page.render(
            **context,
            job_yaml=job_yaml,
            charts=drawn,
            paired="yaxis2" in figures.get("ce", {}).get("layout", {}),
            page_title=f"{report['name']} – distillation report",
            figures=script_json(figures),
            plotly=plotly_script() if figures else "",
            samples=[shown(sample, context["quantiles"]) for sample in samples],
        ),
        "summary.md": summary.render(**context),
    }
    store = LocalStore(run_dir)
    for name, text in files.items():
        store.replace(name, text.encode())
    return [store.path(name) for name in files]


def verdict(report: dict[str, Any]) -> str:
    """Describe the result of the run in one sentence that claims no more than was measured."""
    student, baseline, teacher = (_ce(report, m) for m in ("student", "baseline", "teacher"))
    gap = recovered(report)
    if student is None or teacher is None:
        return "The run measured no finite held-out cross entropy for its student and teacher, so it says nothing on quality."
    if report.get("baseline") is None:
        side = "above" if student >= teacher else "below"
        return (
            f"The student ends {abs(student - teacher):.3f} nats per token {side} its teacher; "
            "without a baseline trained on hard labels alone, this does not tell whether distillation helped."
        )
    if baseline is None:
        return "The baseline has no finite held-out cross entropy, so this run does not tell whether distillation helped."
    worse = student > baseline
    if gap is None:
        than = "worse" if worse else "better"
        return (
            "There is no gap to recover: hard-label training alone is already as good as the teacher; "
            f"the student is {abs(student - baseline):.3f} nats per token {than} than that."
        )
    if worse:
        return (
            "Distillation did not help in this run: the student is "
            f"{student - baseline:.3f} nats per token worse than the same student trained on hard labels alone."
        )
    within = report.get("gap_recovered_interval", "not asked")
    if within is None:
        return (
            f"Hard-label training ends {baseline - teacher:.3f} nats per token above the teacher, too little for these "
            "held-out documents to tell how much of it distillation recovers."
        )
    if gap > 1:
        return (
            "The student recovers the whole gap between hard-label training and its teacher, and does better than its teacher."
        )
    sure = "" if within == "not asked" else f" (95 % interval {words.interval(within, percent)})"
    return f"The student recovers {percent(gap)}{sure} of the gap between hard-label training and its teacher."


def _context(report: dict[str, Any]) -> dict[str, Any]:
    """Return the variables that both templates receive."""
    models = [{"name": m} | {f: report[m].get(f) for f in _FIELDS} for m in MODELS if report.get(m)]
    for model in models:
        model["ce_interval"] = words.interval(report[model["name"]].get("heldout_ce_nats_interval"), words.number)
    return {
        "report": report,
        "models": models,
        "student": report["student"],
        "labels": report["labels"],
        "throughput": report["throughput"],
        "ledger": report["ledger"],
        "ledger_note": _ledger_note(report["ledger"]),
        "stages": report["stages"],
        "faults": report["faults"],
        "bottleneck": report["bottleneck"],
        "heldout": report.get("heldout") or {},
        "quantiles": ((report.get("heldout") or {}).get("kl_quantiles") or {}).get("student") or {},
        "fingerprints": [(k, str(v)[:24]) for k, v in sorted(report["fingerprints"].items())],
        "verdict": verdict(report),
        "baseline_note": facts.baseline_note(report),
        "gap": recovered(report),
        "gap_interval": words.interval(report.get("gap_recovered_interval"), percent),
        "generated": report["generated"],
        "speeds": facts.SPEEDS,
        "training": facts.training_table(report),
        "left_out": facts.left_out_rows(report),
        "data": facts.data_rows(report),
        "hardware": facts.hardware_rows(report),
        "again": facts.again_rows(report),
        "facts": facts.summary_lines(report),
        "scale": _scale(report),
    }


def _scale(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The models' places in percent on a line from the worst to the best cross entropy; empty where it shows nothing."""
    places = {m: _ce(report, m) for m in MODELS}
    teacher, baseline = places["teacher"], places["baseline"]
    if None in places.values() or teacher is None or baseline is None or teacher >= baseline:
        return []
    ces = [ce for ce in places.values() if ce is not None]
    worst, best = max(ces), min(ces)
    scale = [{"name": m, "ce": ce, "at": round(100 * (worst - ce) / (worst - best), 2)} for m, ce in places.items() if ce]
    return scale if 100 * (baseline - teacher) / (worst - best) > 25 else []


def _ledger_note(ledger: dict[str, Any]) -> str:
    """Describe whether every planned label row is accounted for; empty if the ledger's numbers are not known."""
    numbers = [ledger.get(k) for k in ("planned", "committed", "quarantined", "duplicates")]
    if any(n is None for n in numbers):
        return ""
    planned, committed, quarantined, duplicates = (int(n or 0) for n in numbers)
    if planned == committed + quarantined and duplicates == 0:
        return "The ledger balances: every planned row was labelled once" + (" or is quarantined." if quarantined else ".")
    return "The ledger does not balance: planned rows are not the committed and quarantined ones, each once."


def _ce(report: dict[str, Any], model: str) -> float | None:
    return (report.get(model) or {}).get("heldout_ce_nats")


def _finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, because JSON has neither."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
