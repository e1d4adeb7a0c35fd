"""Run directories as finished runs leave them, made without running anything."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.spec.job import Job
from orchestrator.spec.load import load_job, resolved_yaml
from tests.reports import small_report

STEPS = 200
KEY = "5f" * 16
"""Of every stage in which runs do not differ."""


def job(folder: Path, storage: Path, *overrides: str) -> Job:
    file = folder / "job.yaml"
    file.write_text(json.dumps({"name": "past", "storage": str(storage), "train": {"steps": STEPS}}))
    return load_job(file, overrides)


def write_run(
    folder: Path,
    name: str,
    *overrides: str,
    ce: float | None = 3.4,
    status: str = "finished",
    data_key: str = KEY,
    steps: int = STEPS,
) -> Path:
    """A run called `name` in `folder/store` of a job with `overrides`; without a `ce`, it has no report yet."""
    storage = folder / "store"
    spec = job(folder, storage, *overrides)
    directory = storage / "runs" / name
    directory.mkdir(parents=True)
    (directory / "job.yaml").write_text(resolved_yaml(spec))
    stages = {stage: {"stage": stage, "key": KEY, "status": "ran"} for stage in ("teacher", "labels", "student", "baseline")}
    stages["data"] = {"stage": "data", "key": data_key, "status": "ran"}
    (directory / "run.json").write_text(json.dumps({"name": spec.name, "status": status, "attempt": 1, "stages": stages}))
    if ce is not None:
        (directory / "report.json").write_text(json.dumps(report(ce) | {"name": spec.name, "seed": spec.seed}))
    lines = [json.dumps(point) for point in points(ce or 3.5, spec.seed, steps)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "student:5f5f')
    return directory


def report(ce: float) -> dict[str, Any]:
    found = small_report(student=ce, baseline=3.5, teacher=3.2)
    found["student"] |= {"kl_to_teacher_nats": (ce - 3.2) / 2, "top1_agreement": 1 - (ce - 3.2)}
    return found


def points(ce: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """Metric points of a student whose training cross entropy falls towards `ce`, and of its baseline, as metrics.jsonl has
    them."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    found = []
    for step in range(steps):
        own = ce - 0.1 + 4 * math.exp(-step / 25) + noise[step]
        for stage, value in (("student", own), ("baseline", own + 0.1)):
            metrics = {"train/ce_nats": value, "train/loss": value + 0.3}
            if stage == "student" and step % 20 == 19:
                metrics["heldout/ce_nats"] = ce + 4 * math.exp(-step / 25)
            found.append({"stage": f"{stage}:{KEY[:8]}", "step": step, "time_s": 1e9 + step, "metrics": metrics})
    return found
