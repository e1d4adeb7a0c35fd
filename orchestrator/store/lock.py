"""One writer at a time in a directory: a lock that the kernel frees when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import LockedError
from orchestrator.store.files import StillOurs, storage_faults


@contextmanager
def exclusive(path: Path) -> Generator[StillOurs]:
    """Hold the lock file `path`; raises `LockedError`, naming the holder, if another process has it."""
    with storage_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise LockedError(f"{path.parent} is locked by {holder}") from None
        with storage_faults(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder_now().encode(), 0)
        yield lambda: None
    finally:
        os.close(descriptor)


def holder_now() -> str:
    """This process as the holder of a lock, for people: `host:pid since time`."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"{socket.gethostname()}:{os.getpid()} since {since}"
