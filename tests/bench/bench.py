"""What orchestration costs, each figure beside the floor measured in the same call.

    make bench          prints JSON and writes it to tests/bench/results/overhead.json

(a) a train worker with cached labels against the same steps in a bare loop, (b) a teacher actor against a bare forward pass
with the same label extraction, (c) labelling and training side by side against the slower of the two alone, (d) start-up times.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from keep import keep, machine

HERE = Path(__file__).parent
JOB = HERE.parent.parent / "jobs" / "quickstart.yaml"
BIN = Path(sys.executable).parent
ROUNDS = 1
"""Rounds of everything; more on a quiet machine, a round takes about six minutes."""
SETTINGS = [
    "teacher.train.steps=10",
    "teacher.train.warmup_steps=1",
    "teacher.train.checkpoint_every=1000",
    "train.steps=80",
    "evaluate.baseline=false",
    "evaluate.rows=8",
    "tracking.enabled=false",
]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        storage = Path(folder) / "store"
        distill(storage)
        rounds = [one_round(storage) for _ in range(ROUNDS)]
        streamed = [side_by_side(storage) for _ in range(ROUNDS)]
    result = {
        "machine": machine(),
        "train_worker_over_bare": ratios(rounds, "worker_tokens_per_s", "bare_train_tokens_per_s"),
        "teacher_actor_over_bare": ratios(rounds, "actor_tokens_per_s", "bare_label_tokens_per_s"),
        "run_over_slower_side": summary([r["run_s"] / max(r["label_s"], r["train_s"]) for r in streamed]),
        "first_step_s": summary([r["first_step_s"] for r in streamed]),
        "help_s": summary([timed([BIN / "distill", "--help"]) for _ in range(5)]),
        "plan_s": summary([timed([BIN / "distill", "plan", JOB]) for _ in range(5)]),
        "rounds": rounds,
        "side_by_side": streamed,
    }
    keep("overhead", result)


def one_round(storage: Path) -> dict[str, float]:
    """Train and label rates of the orchestrated side and of the floor, one after the other."""
    bare_train = bare("train", storage)
    forget(storage, "student")
    distill(storage)
    worker = manifest(storage, "student")["training"]["tokens_per_s"]
    bare_label = bare("label", storage)
    forget(storage, "labels")
    report = distill(storage)
    return {
        "worker_tokens_per_s": worker,
        "bare_train_tokens_per_s": bare_train["tokens_per_s"],
        "actor_tokens_per_s": report["throughput"]["teacher_tokens_per_s"],
        "bare_label_tokens_per_s": bare_label["tokens_per_s"],
    }


def side_by_side(storage: Path) -> dict[str, float]:
    """Seconds of labelling alone, of training alone, and of both at once, each with its own core."""
    forget(storage, "labels")
    label_s = stage_seconds(distill(storage), "labels")
    forget(storage, "student")
    train_s = stage_seconds(distill(storage), "student")
    forget(storage, "labels", "student")
    report = distill(storage)
    ends = [s["started_s"] + s["seconds"] for s in report["stages"] if s["stage"] in ("labels", "student")]
    begin = min(s["started_s"] for s in report["stages"] if s["stage"] in ("labels", "student"))
    return {
        "label_s": label_s,
        "train_s": train_s,
        "run_s": max(ends) - begin,
        "first_step_s": report["throughput"]["time_to_first_step_s"],
    }


def distill(storage: Path) -> dict[str, Any]:
    command = [BIN / "distill", "run", JOB, "--json", *settings(storage)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def settings(storage: Path) -> list[str]:
    return [part for setting in [*SETTINGS, f"storage={storage}"] for part in ("--set", setting)]


def bare(what: str, storage: Path) -> dict[str, float]:
    command = [sys.executable, HERE / "bare.py", what, storage, JOB, *SETTINGS]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def forget(storage: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(storage / stage, ignore_errors=True)


def manifest(storage: Path, stage: str) -> dict[str, Any]:
    (found,) = (storage / stage).glob("*/manifest.json")
    return json.loads(found.read_text())


def stage_seconds(report: dict[str, Any], stage: str) -> float:
    return next(s["seconds"] for s in report["stages"] if s["stage"] == stage)


def timed(command: list[Any]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def ratios(rounds: list[dict[str, float]], ours: str, floor: str) -> dict[str, float]:
    return summary([r[ours] / r[floor] for r in rounds])


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
