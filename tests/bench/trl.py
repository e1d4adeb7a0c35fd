"""Whole training steps beside TRL's GKDTrainer on the same rows, models and optimizer: speed, memory, losses.

    make bench-trl      prints one JSON line last and writes it to tests/bench/results/trl.json

Forward KL at temperature 1, no cross entropy. One thread; each system in a process of its own, in turn, for some rounds:

    trl       GKDTrainer on the given rows (lmbda 0, beta 0): full logits of teacher and student
    online    ours: the teacher's hidden states in every step, exact divergence, chunked head
    cached    ours: 50 draws per position from the same teacher, made before the clock starts, decoded in every step

Precisions are the same on both sides. medium: all weights fp32, GEMMs at torch's "medium" precision (bf16 products, fp32
sums). bf16: the teacher's weights and activations are bf16, the student trains under bf16 autocast with fp32 weights and
optimizer. The teacher's time counts for `online`. Memory is the peak resident set of the process, imports and all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from envs import trl_python
from keep import keep, machine

HERE = Path(__file__).parent
SEQ, BATCH, RATE = 256, 8, 5e-4
WARM = 2
SYSTEMS = ("online", "trl", "cached")
TARGETS = {"online_tokens_per_cpu_s_ratio": 1.3, "cached_tokens_per_cpu_s_ratio": 3.5, "peak_memory_ratio": 0.7}
"""Speeds at least, memory at most."""


def measure(system: str, case: Path, precision: str, steps: int) -> dict[str, Any]:
    ours = [sys.executable, HERE / "trl_ours.py", case, system]
    command = [trl_python(), "-P", HERE / "trl_gkd.py", case] if system == "trl" else ours
    done = run([*command, precision, steps, BATCH, RATE])
    return {"system": system, "load": os.getloadavg()[0], **json.loads(done.splitlines()[-1])}


def run(command: list[Any]) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{command}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def compared(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over TRL's, of medians over the rounds; losses of the first."""
    of = {system: [r for r in runs if r["system"] == system] for system in SYSTEMS}
    speed = {s: statistics.median(r["tokens_per_cpu_s"] for r in rs) for s, rs in of.items()}
    memory = {s: statistics.median(r["peak_mb"] for r in rs) for s, rs in of.items()}
    losses = zip(of["online"][0]["losses"], of["trl"][0]["losses"], strict=True)
    return {
        "online_tokens_per_cpu_s_ratio": speed["online"] / speed["trl"],
        "cached_tokens_per_cpu_s_ratio": speed["cached"] / speed["trl"],
        "peak_memory_ratio": memory["online"] / memory["trl"],
        "cached_peak_memory_ratio": memory["cached"] / memory["trl"],
        "greatest_relative_loss_difference": max(abs(ours - theirs) / abs(theirs) for ours, theirs in losses),
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "machine": machine(),
        "case": {"vocab": args.vocab, "seq": SEQ, "batch": BATCH, "steps": args.steps, "rate": RATE},
        "targets": TARGETS,
        "ratios": {},
        "runs": {},
    }
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        run([sys.executable, HERE / "trl_case.py", folder, args.vocab, SEQ, (WARM + args.steps) * BATCH])
        for precision in args.precisions:
            runs = []
            for system in SYSTEMS * args.rounds:
                runs.append(measure(system, Path(folder), precision, args.steps))
                print(json.dumps({"precision": precision, **runs[-1]}), flush=True)
            result["runs"][precision] = runs
            result["ratios"][precision] = compared(runs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, choices=[8192, 32768], default=8192)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=["medium", "bf16"], default=["medium", "bf16"])
    args = parser.parse_args()
    trl_python()
    result = compare(args)
    keep("trl", result)


if __name__ == "__main__":
    main()
