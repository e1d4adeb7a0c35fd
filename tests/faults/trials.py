"""How a trial goes: a fault is drawn from a seed, strikes a run at its moment, and is drawn earlier if that came too late."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import PATIENCE_S, Command, Json

ATTEMPTS = 5
EARLIER = 0.7
"""How much earlier the next attempt strikes."""


class Late(Exception):
    """The moment came after the end of what was to be struck."""


def strike_in_time(number: int, drawn: Any, strike: Callable[[float, Path], Json], folder: Path) -> None:
    """Call `strike(sooner, its own folder)` until it is not `Late`; print `drawn`, a dataclass, with the figures of the trial.

    Moments are to be multiplied by `sooner`, which is 1 at first.
    """
    print(json.dumps({"trial": number, **asdict(drawn)}), flush=True)
    for attempt in range(ATTEMPTS):
        own = folder / str(attempt)
        try:
            facts = strike(EARLIER**attempt, own)
            break
        except Late:
            print(json.dumps({"trial": number, "attempt": attempt, "late": True}), flush=True)
            shutil.rmtree(own)
    else:
        pytest.fail(f"in {ATTEMPTS} attempts nothing was struck while it was at work")
    print(json.dumps({"trial": number, **asdict(drawn), "attempt": attempt, **facts}), flush=True)


def wait_for(run: Command, condition: Callable[[], Any]) -> None:
    """Wait for `condition`; raises `Late` if `run` ends well before it holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"the moment never came\n{run.stderr[-4000:]}"
        if not run.running:
            run.wait().assert_ok()
            raise Late
        time.sleep(0.001)
