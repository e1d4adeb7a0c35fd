"""Files that are written on and on, such as a log, in a storage that knows only whole files.

A file `log.jsonl`, which only ever grows, is stored as that file and, once it is large, as `log.jsonl.tail` with what came
since. The tail is stored again and again, the whole file only when the tail has become a good part of it, so what travels
stays in proportion to what was written. At the end the whole file is stored and the tail removed.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import EnvironmentFault, LockedError
from orchestrator.store.interface import StillOurs, Store, storage_faults

EVERY_S = 5.0
GROWING = ".jsonl"
"""Suffix of the names of files that are only appended to."""
TAIL = ".tail"
LARGE_BYTES, LARGE_TAIL = 1 << 20, 0.25
"""A file below this size is always stored whole; of a larger one, a tail may be this share."""

_Version = tuple[int, int]
"""Time of the last change, and size."""


@contextmanager
def mirrored(store: Store, key: str, names: Sequence[str], still_ours: StillOurs, parent: Path) -> Generator[Path]:
    """A new folder in `parent` with the files called `names` of the folder `key`, as far as they are there.

    What is written in it is stored every `EVERY_S` seconds and at the end, while `still_ours`. A process that is killed loses
    what it wrote since the last time.
    """
    folder = parent / f"workspace-{uuid.uuid4().hex[:12]}"
    with storage_faults(folder):
        folder.mkdir()
    mirror = _Mirror(store, key, folder)
    for name in names:
        mirror.fetch(name)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(EVERY_S):
            with suppress(EnvironmentFault, LockedError):  # the last time will tell
                still_ours()
                mirror.store_changes()

    thread = threading.Thread(target=follow, name="mirror", daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        stop.set()
        thread.join()
        try:
            still_ours()
            mirror.store_changes(whole=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Mirror:
    """Brings the files of `folder` into the folder `key` of the storage."""

    def __init__(self, store: Store, key: str, folder: Path) -> None:
        self._store, self._key, self._folder = store, key, folder
        self._stored: dict[str, _Version] = {}
        self._whole: dict[str, int] = {}
        """Bytes of each file as they are stored without its tail."""
        self._tailed: set[str] = set()

    def fetch(self, name: str) -> None:
        """Write what is stored of `name` into the folder, if it is there."""
        key = f"{self._key}/{name}"
        try:
            whole = self._store.read(key)
        except FileNotFoundError:
            return
        content = whole + self._tail(key, len(whole))
        with storage_faults(self._folder):
            (self._folder / name).write_bytes(content)
        self._whole[name] = len(whole) if content.endswith(b"\n") else 0  # a torn line will be cut off: stored anew
        self._stored[name] = _version(self._folder / name)

    def store_changes(self, whole: bool = False) -> None:
        """Store what has changed since the last time; at the end every file as a `whole`."""
        for path in sorted(self._folder.iterdir()):
            if not path.is_file() or path.name.startswith(".tmp"):
                continue
            name, version = path.name, _version(path)
            if self._stored.get(name) != version or (whole and name in self._tailed):
                self._store_file(path, version[1], whole)
                self._stored[name] = version

    def _store_file(self, path: Path, size: int, whole: bool) -> None:
        key, before = f"{self._key}/{path.name}", self._whole.get(path.name, 0)
        small_tail = before >= LARGE_BYTES and before <= size <= before * (1 + LARGE_TAIL)
        if path.name.endswith(GROWING) and small_tail and not whole:
            with path.open("rb") as file:
                file.seek(before)
                self._store.replace(key + TAIL, b"%d\n" % before + file.read())
            self._tailed.add(path.name)
            return
        data = path.read_bytes()
        self._store.replace(key, data)
        self._whole[path.name] = len(data)
        if path.name in self._tailed:
            self._store.remove(key + TAIL)
            self._tailed.discard(path.name)

    def _tail(self, key: str, whole: int) -> bytes:
        """Return what follows the first `whole` bytes; empty where the tail belongs to a smaller file, which contains it by
        now."""
        try:
            offset, _, tail = self._store.read(key + TAIL).partition(b"\n")
        except FileNotFoundError:
            return b""
        self._tailed.add(key.rpartition("/")[2])
        return tail if int(offset) == whole else b""


def _version(path: Path) -> _Version:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
