"""Does distillation beat hard labels? The quickstart over three seeds, teacher and student both seeded anew.

Reuses what `make quickstart` left.

make seeds          prints JSON and writes it to tests/bench/results/seeds.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from keep import keep

HERE = Path(__file__).parent
JOB = HERE.parent.parent / "jobs" / "quickstart.yaml"


def main() -> None:
    rows = [figures(seed, run(seed)) for seed in (0, 1, 2)]
    result = {"job": JOB.name, "seeds": rows, "least_gap_recovered": min(r["gap_recovered"] for r in rows)}
    keep("seeds", result)


def run(seed: int) -> dict[str, Any]:
    settings = [f"name=seed-{seed}", f"seed={seed}", f"teacher.seed={seed}", "tracking.enabled=false"]
    command = [Path(sys.executable).parent / "distill", "run", JOB, "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def figures(seed: int, report: dict[str, Any]) -> dict[str, Any]:
    losses = {f"{name}_ce_nats": report[name]["heldout_ce_nats"] for name in ("teacher", "student", "baseline")}
    kept = {name: report["student"][name] for name in ("kl_to_teacher_nats", "top1_agreement", "ece")}
    return {"seed": seed, "gap_recovered": report["gap_recovered"], **losses, **kept, "wall_s": report["throughput"]["wall_s"]}


if __name__ == "__main__":
    main()
