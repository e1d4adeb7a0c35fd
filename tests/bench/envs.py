"""What the benchmarks need of other projects, each in a folder of its own under .bench-envs: made on first use."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ENVS = Path(__file__).parent.parent.parent / ".bench-envs"
PIP = ["-m", "pip", "install", "-q", "--disable-pip-version-check"]
LIGER = "liger-kernel==0.8.5"
TORCH = "torch>=2.13,<2.14"
TRL = ["trl==1.16.0", "transformers>=5.23,<5.24", "accelerate==1.15.0", "datasets==5.2.0", "numpy"]


def liger_path() -> Path:
    """Liger without what it depends on: its chunked losses import torch only, and no triton."""
    folder = ENVS / "liger"
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run(
            [sys.executable, *PIP, "--no-deps", "--upgrade", "--target", folder, LIGER], stdout=sys.stderr, check=True
        )
        ready.touch()
    return folder


def trl_python() -> Path:
    """The interpreter of an environment with TRL. torch goes first and stays, so that no other build comes with TRL."""
    folder = ENVS / "trl"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        venv.create(folder, with_pip=True)
        for packages in ([TORCH], [TORCH, *TRL]):
            subprocess.run([python, *PIP, *packages], stdout=sys.stderr, check=True)
        ready.touch()
    return python
