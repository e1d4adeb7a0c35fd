"""Measurements in processes of their own: one thread, and memory that nothing has touched before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def fresh(script: str, option: str, asked: Any) -> dict[str, Any]:
    """What `script`, called with `asked` as the JSON of `option`, prints last; raises `SystemExit` if it fails."""
    command = [sys.executable, script, option, json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{asked}: exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
