"""One writer at a time in a directory: a lock that the kernel frees when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import LockedError
from orchestrator.store.interface import Lock, storage_faults, unguarded

LOOK_S = 0.02
"""Longest wait between two tries while other processes only look at the lock."""


@contextmanager
def exclusive(path: Path) -> Generator[Lock]:
    """Hold the lock file `path`; raises `LockedError`, naming the holder, if another process has it."""
    with storage_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not _locked(descriptor, fcntl.LOCK_EX):
            # A shared lock is granted beside processes that only look (`held`), and refused beside a holder.
            if not _locked(descriptor, fcntl.LOCK_SH):
                raise LockedError(f"{path.parent} is locked by {_holder(descriptor)}")
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            time.sleep(random.uniform(0, LOOK_S))
        token = uuid.uuid4().hex
        with storage_faults(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder_now()}\n{token}".encode(), 0)
        yield Lock(token, unguarded)  # the kernel takes it from nobody who lives
    finally:
        os.close(descriptor)


def check(path: Path, token: str) -> None:
    """Raise `LockedError`, naming the holder, unless the lock file `path` was last taken under `token`."""
    try:
        holder, _, last = path.read_text().partition("\n")
    except FileNotFoundError:
        holder = last = ""
    if last != token:
        raise LockedError(f"{path.parent} is locked by {holder or 'another process'}")


def held(path: Path) -> bool:
    """Return whether a process holds the lock file `path`; never takes it from a process that wants it."""
    if not path.exists():
        return False
    with storage_faults(path), path.open("rb") as file:
        return not _locked(file.fileno(), fcntl.LOCK_SH)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").partition("\n")[0] or "another process"


def holder_now() -> str:
    """This process as the holder of a lock, for people: `host:pid since time`."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"{socket.gethostname()}:{os.getpid()} since {since}"
