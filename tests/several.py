"""`python -m tests.several JOB...`: `distill run` each job, one after another, on one Ray that is started once.

Prints a JSON line per job: its exit code, what it wrote to stderr, and the content of its storage afterwards.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from orchestrator.cli import main
from orchestrator.runtime.session import ray_session
from orchestrator.spec.job import Cluster
from tests.tiny import contents

CPUS = 2


def run(file: str) -> tuple[int, str]:
    """Exit code and stderr of `distill run FILE`."""
    sys.argv = ["distill", "run", file]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
    return code, stderr.getvalue()


if __name__ == "__main__":
    with ray_session(Cluster(), CPUS):
        for file in sys.argv[1:]:
            code, stderr = run(file)
            storage = Path(json.loads(Path(file).read_text())["storage"])
            print(json.dumps({"code": code, "stderr": stderr, "files": contents(storage)}), flush=True)
