"""Errors that a user can act on, each with the process exit code it ends in.

Exit codes: 0 ok, 1 bug, 2 job file or usage, 3 input data, 4 environment, 5 integrity, 6 failed but resumable,
7 locked by another run, 130/143 signals. Anything that is not a `DistillError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from typing import ClassVar

MAX_MESSAGE_CHARS = 300
BROKEN_LINK = re.compile(r"connection|gloo|nccl|socket|broken pipe|tim(ed |e)out|recv|rendezvous", re.IGNORECASE)
"""Pattern of the errors that torch raises in the neighbours of a process that died."""


class DistillError(Exception):
    """A failure the user can act on: one line that names the key, file or row."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        self.message = one_line(message)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message  # Ray Data adds advice of its own to `args`


class SpecError(DistillError):
    """The job file, an override or the command line is wrong."""

    exit_code = 2


class DataError(DistillError):
    """Input data, or what a teacher made of it, cannot be used."""

    exit_code = 3


class EnvironmentFault(DistillError):
    """The machine lacks something: space, permission, a package, resources."""

    exit_code = 4


class IntegrityError(DistillError):
    """Stored bytes are not the bytes that were written."""

    exit_code = 5


class ResumableError(DistillError):
    """The run broke off; running the same job again continues it."""

    exit_code = 6


class LockedError(DistillError):
    """Another process works on the same thing."""

    exit_code = 7


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: no error, and nothing that an `except Exception` should swallow."""


def one_line(message: str) -> str:
    """`message` without control characters, as one line of at most `MAX_MESSAGE_CHARS`."""
    flat = " ".join(message.split())
    visible = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in flat)
    return visible if len(visible) <= MAX_MESSAGE_CHARS else visible[: MAX_MESSAGE_CHARS - 1] + "…"


def find_user_error(error: BaseException) -> DistillError | None:
    """The `DistillError` that caused `error`, however many layers of remote wrappers lie around it."""
    seen: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, DistillError):
            return _innermost(current)
        inner = [getattr(current, "cause", None), current.__cause__, current.__context__]
        inner += list(getattr(current, "worker_failures", {}).values())
        queue += [e for e in inner if isinstance(e, BaseException)]
    return None


def _innermost(error: DistillError) -> DistillError:
    """`error` without Ray's wrapper, which is of the same class and has a traceback for its text."""
    while isinstance(cause := getattr(error, "cause", None), DistillError):
        error = cause
    return error
