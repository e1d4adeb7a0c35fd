"""What a person is told whose Ctrl-C, or whose `distill stop`, has ended a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from orchestrator.runtime.environment import job_tags


def say_stopped(how: str, arguments: Sequence[str]) -> None:
    """Print one line if the command with `arguments`, which was `how` ("interrupted", "terminated"), was a run.

    It says that the work is kept and how to go on. On a cluster the command is not the one that the user gave.
    """
    if list(arguments[:1]) == ["run"]:
        again = "" if job_tags() else f": {shlex.join(['distill', *arguments])}"
        print(f"{how}; what was done is kept; run the same job again to continue{again}", file=sys.stderr)
