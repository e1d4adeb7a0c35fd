"""Keeping off the terminal what Ray's core writes there and no user can act on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout

NOISE = ("has constructor arguments in the object store and max_restarts > 0", "^$")
"""Patterns of lines that are left out.

The first is an error by its level, and true of every actor pool of Ray Data: an actor cannot restart once its constructor's
arguments are lost. Ray Data puts them into the object store of the driver's node, which spills such objects and never evicts
them. So they are lost only with that node, and the run is lost with it too. `tests/faults/test_kills.py` and `test_setbacks.py`
see actors restart. An empty line follows the error.
"""
CLOSE_S = 2.0


@contextmanager
def stdout_for_data() -> Generator[None]:
    """Send to stderr what Ray and DeepSpeed print, less the lines of `NOISE`; stdout is left to the result."""
    with _quiet_core(), redirect_stdout(sys.stderr):
        yield


@contextmanager
def _quiet_core() -> Generator[None]:
    """Keep lines of `NOISE` off this process's stderr; every other line arrives, also the last words of one that dies.

    Ray's core writes to file descriptor 2, past Python. Here that leads to a grep, a process of its own that outlives this
    one, while what Python writes goes where it went before. Ray's own setting, RAY_BACKEND_LOG_LEVEL, would silence all
    errors of all its processes and announces itself on stderr. Where stderr has been replaced, nothing is done.
    """
    if sys.stderr is not sys.__stderr__ or sys.stderr is None or sys.stderr.fileno() != 2:
        yield
        return
    python_stderr, terminal = sys.stderr, os.dup(2)
    patterns = [word for pattern in NOISE for word in ("-e", pattern)]
    grep = subprocess.Popen(
        ["grep", "--line-buffered", "-v", *patterns], stdin=subprocess.PIPE, stdout=terminal, start_new_session=True
    )
    assert grep.stdin is not None
    python_stderr.flush()
    os.dup2(grep.stdin.fileno(), 2)
    grep.stdin.close()
    sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding=python_stderr.encoding, errors=python_stderr.errors)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        sys.stderr.close()
        sys.stderr = python_stderr
        try:
            grep.wait(CLOSE_S)
        except subprocess.TimeoutExpired:  # a process that goes on has inherited the pipe
            grep.terminate()
