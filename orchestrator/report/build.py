"""Writes what a run leaves for its readers: `report.json`, `report.html` and `summary.md`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orchestrator.report.charts import MODELS, charts, duration
from orchestrator.store.local import LocalStore

NOTHING = "–"
_FIELDS = ("params", "active_params", "heldout_ce_nats", "heldout_ppl", "top1_accuracy", "tokens_per_s", "size_bytes")


def write_report(run_dir: Path, report: dict[str, Any], points: list[dict[str, Any]], job_yaml: str) -> list[Path]:
    """Write the three files into `run_dir`, each whole or not at all, and return their paths.

    `report` follows the report.json contract, with `name`, `stages` and perhaps `samples` besides; `points` are the
    run's metric points, their `time_s` and the stages' `started_s` both counted from the start of the run.
    """
    report = _finite(report)
    context = _context(report)
    figures = charts(report, _finite(points))
    page = _templates().get_template("page.html.j2")
    summary = _templates().get_template("summary.md.j2")
    files = {
        "report.json": json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        "report.html": page.render(
            **context,
            job_yaml=job_yaml,
            charts=list(figures),
            paired="yaxis2" in figures.get("ce", {}).get("layout", {}),
            figures=_script_json(figures),
            plotly_js=Markup(get_plotlyjs()) if figures else "",
        ),
        "summary.md": summary.render(**context),
    }
    store = LocalStore(run_dir)
    for name, text in files.items():
        store.replace(name, text.encode())
    return [store.path(name) for name in files]


def verdict(report: dict[str, Any]) -> str:
    """What the run showed, in one sentence that claims no more than was measured."""
    student, baseline, teacher = (_ce(report, m) for m in ("student", "baseline", "teacher"))
    gap = report.get("gap_recovered")
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
    if gap is None or baseline <= teacher:
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
    if gap > 1:
        return (
            "The student recovers the whole gap between hard-label training and its teacher, and does better than its teacher."
        )
    return f"The student recovers {percent(gap)} of the gap between hard-label training and its teacher."


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with `digits` decimals."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return NOTHING if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """Three significant digits with a decimal prefix: `270 M`, `1.24 B`."""
    return NOTHING if value is None else _prefixed(value, ("", "k", "M", "B", "T"))


def size(value: float | None) -> str:
    """A number of bytes with a decimal prefix: `1.08 GB`."""
    return NOTHING if value is None else _prefixed(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def percent(value: float | None) -> str:
    """A fraction in percent; one decimal where whole percents would round something to nothing or to all."""
    if value is None:
        return NOTHING
    whole = abs(value) >= 0.0995 and abs(value) <= 0.9949
    return f"{100 * value:.{0 if whole or value in (0, 1) else 1}f} %".replace("-", "−")


def seconds(value: float | None) -> str:
    """A duration in words."""
    return NOTHING if value is None else duration(value)


def _prefixed(value: float, prefixes: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 or (power == 0 and value == int(value)) else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[power]}".strip()


def _context(report: dict[str, Any]) -> dict[str, Any]:
    """What both templates are given."""
    models = [{"name": m} | {f: (report.get(m) or {}).get(f) for f in _FIELDS} for m in MODELS if report.get(m)]
    return {
        "report": report,
        "models": models,
        "student": report.get("student") or {},
        "labels": report.get("labels") or {},
        "throughput": report.get("throughput") or {},
        "ledger": report.get("ledger") or {},
        "ledger_note": _ledger_note(report.get("ledger") or {}),
        "stages": report.get("stages") or [],
        "samples": report.get("samples") or [],
        "fingerprints": [(k, str(v)[:24]) for k, v in sorted((report.get("fingerprints") or {}).items())],
        "verdict": verdict(report),
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
    """Whether every planned label row is accounted for, in words."""
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


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element whatever strings it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _templates() -> Environment:
    """The templates beside this module; all they are given is HTML-escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {f.__name__: f for f in (number, count, short, size, percent, seconds)}
    return environment
