"""The command that measures rates on this machine and plans with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


def test_the_command_measures_and_plans_with_it() -> None:
    settings = ["-c", "student.model.config.num_hidden_layers=6", "-c", "data.seq_len=64", "-c", "train.micro_batch=2"]
    command = [sys.executable, "-m", "orchestrator.cli", "plan", str(JOB), "--cluster", "8xCPU", "--calibrate", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "on 8 CPU (1 nodes), as measured" in done.stdout
