"""A small run as the report is given it: figures, stages, metric points, and texts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.evaluate.tokens import TeacherComparison, by_token
from orchestrator.plan.resources import Room
from orchestrator.report.build import write_figures, write_pages
from orchestrator.report.timeline import bottleneck, lanes

STEPS, SHARDS, TOKENS = 20, 8, 5000


def model(ce: float, params: int) -> dict[str, Any]:
    return {
        "params": params,
        "active_params": params,
        "heldout_ce_nats": ce,
        "heldout_ppl": math.exp(ce),
        "top1_accuracy": 0.4,
        "tokens_per_s": 1234.5,
        "size_bytes": 2 * params,
    }


def small_report(student: float = 3.375, baseline: float | None = 3.4, teacher: float = 3.3) -> dict[str, Any]:
    gap = None if baseline is None or baseline == teacher else (baseline - student) / (baseline - teacher)
    return {
        "name": "tiny",
        "teacher": model(teacher, 268_000_000),
        "student": model(student, 31_400_000) | {"kl_to_teacher_nats": 0.1432, "top1_agreement": 0.687, "ece": 0.021},
        "baseline": None if baseline is None else model(baseline, 31_400_000),
        "gap_recovered": gap,
        "labels": {"kind": "sampled", "bytes_per_token": 72.4, "rows": 64, "shards": 4, "bytes": 9999, "reused_shards": 0},
        "throughput": {
            "teacher_tokens_per_s": 18210.0,
            "student_tokens_per_s": 26750.0,
            "teacher_wait_fraction": 0.04,
            "student_wait_fraction": 0.31,
            "time_to_first_step_s": 4.5,
            "wall_s": 61.0,
        },
        "ledger": {"planned": 64, "committed": 64, "quarantined": 0, "duplicates": 0},
        "versions": {"python": "3.11"},
        "seed": 7,
        "git_commit": "7c1e2fdb0c5f4f1d",
        "fingerprints": {"labels": "ab" * 32},
        "job_file": "/data/runs/tiny/job.yaml",
        "stages": [
            {"stage": "data", "status": "reused", "started_s": 0.0, "seconds": 0.0},
            {"stage": "labels", "status": "ran", "started_s": 1.0, "seconds": 18.0},
            {"stage": "student", "status": "ran", "started_s": 1.0, "seconds": 40.0},
        ],
        "attempt": 1,
        "faults": [],
        "bottleneck": "Teacher and student kept pace.",
        "timeline": {},
        "generated": [],
        "data": {
            "source": "text",
            "documents": 321,
            "heldout_documents": 64,
            "skipped_documents": 2,
            "rows": 64,
            "heldout_rows": 16,
            "tokens": 64 * 128,
            "dropped_tokens": 57,
            "seq_len": 128,
            "target_share": 0.75,
        },
        "training": {
            name: {
                "steps": 20,
                "rows_seen": 160,
                "rows_there": 64,
                "passes": 2.5,
                "tokens_seen": 160 * 128,
                "kept_step": 15,
                "tokens_per_s": 26750.0,
                "label_wait_fraction": wait,
                "peak_memory_bytes": 1_420_000_000,
            }
            for name, wait in (("student", 0.31), ("baseline", 0.0))
        },
        "left_out": {},
        "hardware": [{"node": "10.0.0.1", "cores": 16, "memory_bytes": 137_000_000_000, "gpus": ["H200"]}],
        "tracking": "http://localhost:5000/#/experiments/1/runs/abc",
    }


def small_points(steps: int = STEPS) -> list[dict[str, Any]]:
    """A step and a post each second; the student waits for labels in the first half. A label shard every two seconds."""
    points = []
    for step in range(steps):
        for stage, extra in (("student", 0.0), ("baseline", 0.1)):
            ce = 4 - step / steps + extra
            metrics = {"train/ce_nats": ce, "train/loss": ce, "train/kd_nats": 0.5, "train/tokens_per_s": 900.0 + step}
            metrics |= {"train/learning_rate": 1e-3 * (1 - step / steps), "train/grad_norm": 1 + 1 / (step + 1)}
            if step % 5 == 4:
                metrics |= {"heldout/ce_nats": ce + 0.05, "heldout/kl_nats": 0.3 - step / 100}
            metrics |= {"train/interval_s": 1.0, "train/label_wait_fraction": 0.8 if step <= steps // 2 else 0.0}
            points.append({"stage": stage, "step": step, "time_s": 5.0 + step, "metrics": metrics})
    for shard in range(1, SHARDS + 1):
        sums = {"label/busy_s": 1.5 * shard, "label/blocked_s": 0.3 * shard, "label/idle_s": 0.2 * shard}
        metrics = {"label/tokens_per_s": 800.0, "label/shards_committed": shard, **sums}
        points.append({"stage": "labels", "step": shard, "time_s": 2.0 + 2 * shard, "metrics": metrics})
    return points


def whole_report(seed: int) -> dict[str, Any]:
    """With everything that a run adds to `small_report`, on random tokens, and a fault."""
    random = np.random.default_rng(seed)
    entropy = random.gamma(2, 1.5, TOKENS)
    against = {
        name: TeacherComparison(random.lognormal(mean, 1.3, TOKENS), random.random(TOKENS) < rate * np.exp(-entropy / 20))
        for name, mean, rate in (("student", -2.0, 0.9), ("baseline", -1.0, 0.7))
    }
    report = small_report()
    report["heldout"] = by_token(entropy, against)
    report["timeline"] = {lane.stage: lane.figures() for lane in lanes(report["stages"], small_points())}
    report["bottleneck"] = bottleneck(report["stages"], report["timeline"], 61.0, Room(replica=True, worker=True))
    report |= {
        "gap_recovered_interval": [0.18, 0.31],
        "generated": [
            {"prompt": "def f(x):", "teacher": "\n    return x + 1", "student": "\n    return x", "baseline": ""},
            {"prompt": "The student's", "teacher": " teacher <b>", "student": " teacher", "baseline": " the the"},
        ],
    }
    for name in ("teacher", "student", "baseline"):
        ce = report[name]["heldout_ce_nats"]
        report[name]["heldout_ce_nats_interval"] = [ce - 0.02, ce + 0.02]
    report["faults"] = [{"attempt": 1, "time_s": 12.0, "text": "student: a training worker died; retry 1/3"}]
    return report


def write_report(folder: Path, report: dict[str, Any], points: Any, samples: Any, job: str) -> list[Path]:
    """All that a run leaves for its readers: report.json, report.html and summary.md."""
    return [write_figures(folder, report), *write_pages(folder, report, points, samples, job)]


def small_samples(text: str = " the") -> list[list[dict[str, Any]]]:
    """Two texts of four tokens, one of them `text` and also the teacher's first guess everywhere."""
    guesses = [{"text": t, "probability": p} for t, p in ((text, 0.5), (" a", 0.25), ("\n", 0.125))]
    tokens = [
        {"text": t, "kl_nats": nats, "teacher": 0.5, "student": 0.25, "teacher_top": guesses, "student_top": guesses[::-1]}
        for t, nats in ((text, 0.001), ("", 0.1), ("é", 0.3), ("\n\tif", 9.0))
    ]
    return [tokens, tokens[::-1]]
