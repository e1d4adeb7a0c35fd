"""Hashes of large files outside of the storage, remembered in it, so that a model is not read whole at the start of every run.

    hashes/<folder>.json   by file name: size, times and inode as they were, and the SHA-256 of what was read then

A remembered hash holds as long as size, inode and both times are the same. A file that was written within `SETTLED_S` of
being read is not remembered: it could be written again without its time showing it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.files import Store, sha256_of
from orchestrator.store.records import FileRecord, Record

SETTLED_S = 2.0
READERS = 8
"""Threads that read and hash; one of them hashes about 1.8 GB/s."""


class _Known(FileRecord):
    """A file as it was when it was hashed."""

    mtime_ns: int
    ctime_ns: int
    """It changes with every write and cannot be set back, as `mtime_ns` can."""
    inode: int


class _KnownFolder(Record):
    folder: str
    files: dict[str, _Known]
    """By name relative to `folder`."""


def describe_known(store: Store, folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and hash of the files `names` of `folder`, as `describe_folder` tells them; only what has changed is read."""
    key = f"hashes/{fingerprint('folder', str(folder))}.json"
    known = _KnownFolder.load(store, key)
    before = known.files if known is not None else {}
    wanted = sorted(names)

    def look(name: str) -> tuple[_Known, bool]:
        return _known(folder / name, before.get(name))

    with ThreadPoolExecutor(READERS) as readers:
        found = dict(zip(wanted, readers.map(look, wanted), strict=True))
    settled = {name: file for name, (file, is_settled) in found.items() if is_settled}
    if any(before.get(name) != file for name, file in settled.items()):
        _KnownFolder(folder=str(folder), files=before | settled).save(store, key)
    return {name: FileRecord(sha256=file.sha256, bytes=file.bytes) for name, (file, _) in found.items()}


def _known(path: Path, before: _Known | None) -> tuple[_Known, bool]:
    """The record of the file at `path`, and whether it may be remembered."""
    now = _stamped(path, before.sha256 if before else "")
    if now == before:
        return now, True
    started_ns = time.time_ns()
    read = _stamped(path, sha256_of(path))
    unchanged = now.model_copy(update={"sha256": read.sha256}) == read
    return read, unchanged and max(read.mtime_ns, read.ctime_ns) < started_ns - SETTLED_S * 1e9


def _stamped(path: Path, sha256: str) -> _Known:
    stat = path.stat()
    return _Known(sha256=sha256, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns, inode=stat.st_ino)
