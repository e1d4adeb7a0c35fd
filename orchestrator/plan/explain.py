"""A plan in words and as data."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from orchestrator.plan.make import Plan, Training


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data; `plan.json` of a run."""
    return {
        "job": plan.job.model_dump(mode="json"),
        "run_directory": plan.run_directory,
        "stages": [asdict(stage) for stage in plan.stages],
        "student": asdict(plan.student),
        "teacher": asdict(plan.teacher) if plan.teacher else None,
        "label_rows": plan.label_rows,
        "label_bytes_at_most": plan.label_bytes_at_most,
        "cpu_slots": plan.cpu_slots,
    }


def explain(plan: Plan) -> str:
    """The plan for a person."""
    lines = [f"{plan.job.name}: {plan.run_directory}", "", "stages"]
    for stage in plan.stages:
        needs = f"{stage.cpus:g} CPU" + (f" {stage.gpus:g} GPU" if stage.gpus else "") if stage.cpus or stage.gpus else "driver"
        lines.append(f"  {stage.name:<9} {needs:<14} {stage.what}")
    if plan.teacher:
        lines += ["", "teacher, trained here", *_training_lines(plan.teacher)]
    lines += ["", "student", *_training_lines(plan.student)]
    if plan.job.train.precision == "fp8" and plan.job.train.gpus_per_worker == 0:
        lines.append("  fp8       emulated, for no GPU is asked for: rounds as fp8 does and is slower than bf16")
    lines += ["", f"labels: {plan.job.labels.kind}, {_label_size(plan)}"]
    return "\n".join(lines)


def explain_deepspeed(plan: Plan) -> str:
    """The student's DeepSpeed configuration, as it will be handed over."""
    return f"deepspeed\n{json.dumps(plan.student.deepspeed, indent=2)}"


def _label_size(plan: Plan) -> str:
    if plan.label_rows is None or plan.label_bytes_at_most is None:
        return "as many rows as the student's epochs have"
    return f"{plan.label_rows:,} rows, at most {plan.label_bytes_at_most / 2**20:,.0f} MiB"


def _training_lines(training: Training) -> list[str]:
    b = training.batch
    factors = f"{b.ranks} data-parallel ranks x {b.accumulation} accumulation x {b.micro_rows} rows"
    algebra = [f"  batch     {b.global_rows} rows = {factors}", f"  length    {training.length}{_seen(training)}"]
    if training.memory is None:
        return [
            "  params    not known before the run: config.json is not here, or of a type that the planner cannot count",
            *algebra,
        ]
    m = training.memory
    parts = {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "activations": m.activations,
        "head": m.head,
        "buffers": m.buffers,
        "process": m.process,
    }
    listed = " + ".join(f"{name} {value / 2**20:,.0f}" for name, value in parts.items() if value >= 2**19)
    active = f", {training.active_params:,} active" if training.active_params != training.params else ""
    return [f"  params    {training.params:,}{active}", *algebra, f"  memory    {m.total / 2**20:,.0f} MiB a worker: {listed}"]


def _seen(training: Training) -> str:
    if training.rows_seen is None:
        return "; steps, rows and tokens are known once there are token shards"
    return f" = {training.rows_seen:,} rows seen, {training.tokens_seen:,} tokens"
