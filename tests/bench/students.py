"""Every kind of student on the quickstart's task: mixtures of experts, multi-token prediction, other starts, fp8.

    make students       prints JSON and writes it to tests/bench/results/students.json

Data, teacher and labels are those of `make quickstart`, which is reused. A baseline is the same student on hard labels alone;
where there is multi-token prediction, its modules too have learnt from hard labels alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EXPORT = "distill-store/runs/quickstart/export"
DEEPER = ["student.model.config.num_hidden_layers=4", "train.steps=200", "evaluate.baseline=false"]
"""fp8 leaves the first and the last block alone, and the quickstart's student has no other."""
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("quickstart", []),
    "mixtral": ("quickstart-mixtral", []),
    "qwen3-moe": ("quickstart-qwen3-moe", []),
    "deepseek-v3": ("quickstart-deepseek-v3", []),
    "mtp": ("quickstart", ["student.mtp_depth=1"]),
    "pruned": ("quickstart", ["student={kind: pruned, layers: 2, intermediate_size: 384}"]),
    "continued": ("quickstart", [f"student={{kind: checkpoint, path: {EXPORT}}}"]),
    "upcycled": ("quickstart", [f"student={{kind: upcycled, path: {EXPORT}, experts: 4, experts_per_token: 2}}"]),
    **{
        f"{precision}-{seed}": ("quickstart", [*DEEPER, f"seed={seed}", *settings])
        for seed in (0, 1, 2)
        for precision, settings in {
            "bf16": ["train.precision=bf16"],
            "fp8-rowwise": ["train.precision=fp8"],
            "fp8-tensorwise": ["train.precision=fp8", "train.fp8_recipe=tensorwise"],
        }.items()
    },
}
"""By name: job file and overrides."""


def run(name: str) -> dict[str, Any]:
    job, settings = VARIANTS[name]
    if name != job:
        settings = [*settings, f"name=students-{name}"]
    command = [sys.executable, "-m", "orchestrator.cli", "run", ROOT / "jobs" / f"{job}.yaml", "--json"]
    command += [part for setting in [*settings, "tracking.enabled=false"] for part in ("--set", setting)]
    load = os.getloadavg()[0]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return figures(json.loads(done.stdout.splitlines()[-1])) | {"load": load}


def figures(report: dict[str, Any]) -> dict[str, Any]:
    kept = ("params", "active_params", "heldout_ce_nats", "mtp_acceptance_1", "mtp_tokens_per_forward")
    models = {
        name: {key: report[name][key] for key in kept if key in report[name]}
        for name in ("teacher", "student", "baseline")
        if report[name]
    }
    pace = report["throughput"]["student_tokens_per_s"]
    return {"gap_recovered": report["gap_recovered"], **models, "student_tokens_per_s": pace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(VARIANTS)}; default: all")
    file = HERE / "results" / "students.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in parser.parse_args().names or VARIANTS:
        result[name] = run(name)
        print(json.dumps({name: result[name]}), flush=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
