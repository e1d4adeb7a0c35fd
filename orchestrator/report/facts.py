"""Facts in the report beside its quality figures: what was trained on what, where, and how to reproduce it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from orchestrator.report.charts.figure import MODELS
from orchestrator.report.words import NOTHING, count, number, percent, size

SPEEDS = (
    "Training and labelling speeds are tokens of the rows that were read, prompts included, by the time from the first step "
    "(or shard) to the last, waiting included; evaluation tokens/s are of forward passes alone."
)
"""The one definition of each speed: display, report and MLflow all have figures of it."""

Rows = list[tuple[str, str]]


def baseline_note(report: Mapping[str, Any]) -> str:
    """One sentence that says what the baseline is; empty without one."""
    if not report.get("baseline"):
        return ""
    student, baseline = (report["training"].get(name) or {} for name in ("student", "baseline"))
    equal = all(student.get(key) == baseline.get(key) for key in ("steps", "kept_step"))
    length = "rows and steps" if equal else "rows (each ends, or is kept, where held-out cross entropy says so)"
    return f"The baseline is the same student with the same initial weights, {length}, trained on hard labels alone."


def training_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line for each model that was trained; columns that no training has a figure for are left out."""
    trainings = report["training"]
    columns = {
        "steps": lambda t: count(t.get("steps")),
        "kept step": lambda t: count(t.get("kept_step")),
        "rows read": lambda t: count(t.get("rows_seen")),
        "of rows there": lambda t: count(t.get("rows_there")),
        "passes": lambda t: number(t.get("passes"), 2),
        "tokens": lambda t: count(t.get("tokens_seen")),
        "tokens/s": lambda t: count(t.get("tokens_per_s")),
        "waiting": lambda t: percent(t.get("label_wait_fraction")),
        "peak memory of a worker": lambda t: size(t.get("peak_memory_bytes")),
    }
    shown = [m for m in MODELS if m in trainings]
    cells = {head: [cell(trainings[m]) for m in shown] for head, cell in columns.items()}
    kept = {head: column for head, column in cells.items() if set(column) != {NOTHING}}
    return ["", *kept], [[model, *(column[i] for column in kept.values())] for i, model in enumerate(shown)]


def left_out_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A line for each step that was left out: the training, the step, its loss, and the rows to look at."""
    return [
        [training, str(step["step"]), step["loss"], " ".join(step["rows"]) or "all losses finite, the gradient not"]
        for training, steps in report["left_out"].items()
        for step in steps
    ]


def data_rows(report: Mapping[str, Any]) -> Rows:
    data = report["data"]
    learnt = [("learnt of them, the rest is prompts", percent(data["target_share"]))] if data["target_share"] < 1 else []
    return [
        ("source", data["source"]),
        ("training documents", count(data["documents"])),
        ("held-out documents", count(data["heldout_documents"])),
        ("skipped documents", count(data["skipped_documents"])),
        ("rows to train on", f"{count(data['rows'])} of {count(data['seq_len'])} tokens"),
        ("held-out rows", count(data["heldout_rows"])),
        ("tokens to train on", count(data["tokens"])),
        *learnt,
        ("dropped tokens", count(data["dropped_tokens"])),
    ]


def hardware_rows(report: Mapping[str, Any]) -> Rows:
    """Nodes that are alike share a line."""
    nodes = report["hardware"]
    kinds = Counter((n["cores"], size(n["memory_bytes"]), tuple(n["gpus"])) for n in nodes)
    return [
        (
            "1 machine" if machines == 1 else f"{machines} machines, each",
            ", ".join([f"{cores} core{'s' if cores != 1 else ''}", memory, *_gpus(gpus)]),
        )
        for (cores, memory, gpus), machines in kinds.items()
    ]


def again_rows(report: Mapping[str, Any]) -> Rows:
    """The command that runs the job again, and where the run is tracked."""
    tracked = [("MLflow", report["tracking"])] if report["tracking"] else []
    return [("run it again", f"distill run {report['job_file']}"), *tracked]


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The same in few words."""
    data = report["data"]
    lines = [
        f"Data: {count(data['documents'])} training documents, {count(data['rows'])} rows of {count(data['seq_len'])} tokens, "
        f"{count(data['heldout_rows'])} held out, {count(data['dropped_tokens'])} tokens dropped"
    ]
    student = report["training"].get("student", {})
    if "passes" in student:
        lines.append(
            f"Student: {count(student['steps'])} steps, {count(student['rows_seen'])} rows read "
            f"({number(student['passes'], 2)} passes), {count(student['tokens_seen'])} tokens"
        )
    lines.append("Hardware: " + "; ".join(f"{name}: {what}" for name, what in hardware_rows(report)))
    return lines + [f"{name.capitalize() if name != 'MLflow' else name}: `{value}`" for name, value in again_rows(report)]


def _gpus(gpus: tuple[str, ...]) -> list[str]:
    return [f"{n} × {name}" for name, n in Counter(gpus).items()]
