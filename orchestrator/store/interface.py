"""Interface of a storage: files and folders that are either complete or absent.

The three writes are `put_if_absent` (first writer wins; the building block of every commit), `replace` (the newest whole
version wins) and `publish` (a finished folder).
"""

from __future__ import annotations

import errno
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import EnvironmentFault
from orchestrator.store.file_record import FileRecord

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

StillOurs = Callable[[], None]
"""Raises `LockedError` if a lock that was taken has been lost since."""

UNFINISHED = ".tmp"
"""Beginning of the names of things that are still being made: `Store.keys` leaves them out, `Store.sweep` removes them."""


def unguarded() -> None:
    """Let a write through that no lock guards."""


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds; call it to learn whether that is still so."""

    token: str
    """Names this one taking of the lock. Other processes may ask by it (`Store.check_lock`)."""
    still_ours: StillOurs

    def __call__(self) -> None:
        """Raise `LockedError` if the lock has been lost since."""
        self.still_ours()


@dataclass(frozen=True)
class HeldElsewhere:
    """A lock that another process holds for this one, such as a driver for its workers."""

    store: Store
    key: str
    token: str

    def __call__(self) -> None:
        """Raise `LockedError`, naming the new holder, if the lock is not held under this token any more."""
        self.store.check_lock(self.key, self.token)


@dataclass(frozen=True)
class Part:
    """One process's contribution to a folder that is being built."""

    folder: Path
    """Folder that the process writes to."""
    files: dict[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    """By relative name, once it has written them all. Files that are put in here before the part ends are not hashed again."""


class Store(ABC):
    """Files and folders addressed by keys with `/`; picklable and cheap to make, so that remote workers can carry it.

    Every method raises `EnvironmentFault`, naming the address, for a storage that is full, gone or forbidden.
    """

    @abstractmethod
    def address(self, key: str = "") -> str:
        """Return the location of `key` as a person would write it, in the form that `local_folder` takes."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether there is a file or a finished folder `key`."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole content; raises `FileNotFoundError` for a key that is not there."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer where the file ends before; raises `FileNotFoundError`."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """The file for reading, of which only what is read need travel; raises `FileNotFoundError`."""

    def read_json(self, key: str) -> Any | None:
        """The parsed content, or None for a key that is not there."""
        try:
            return json.loads(self.read(key))
        except FileNotFoundError:
            return None

    @abstractmethod
    def keys(self, folder: str) -> list[str]:
        """Names of the complete files and finished folders in `folder`, sorted."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `data` under `key` unless it is taken; True if `data` is what stands there afterwards. Atomic and durable."""

    @abstractmethod
    def replace(self, key: str, data: bytes, private: bool = False) -> None:
        """Write `data` under `key`, whatever stood there. Atomic and durable.

        `private` is for its owner's eyes only, where the storage knows of owners.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove the file or folder `key` and what is in it, if there is any."""

    @abstractmethod
    def contents(self, key: str) -> dict[str, FileRecord] | None:
        """The files of the finished folder `key` as they are now; None if there is none or if it is visibly damaged."""

    @abstractmethod
    def local(self, key: str) -> Path:
        """The finished folder `key` as a folder on this node, only to be read.

        Raises `FileNotFoundError` if there is none, and `IntegrityError` if what arrives here is not what was stored.
        """

    @abstractmethod
    def forget(self, key: str) -> None:
        """Free what `local(key)` and `outline(key)` take on this node beside the storage; nobody may be reading it."""

    @abstractmethod
    def holds(self, key: str, files: Mapping[str, FileRecord]) -> bool:
        """Return whether these files of the finished folder `key`, by relative name, are unchanged since they were recorded."""

    @abstractmethod
    def outline(self, key: str) -> Path:
        """The finished folder `key` as a folder on this node whose files may be empty until they are fetched.

        For programs that open few of many files. Raises `FileNotFoundError` if there is no such folder.
        """

    @abstractmethod
    def fetch(self, key: str, name: str) -> Path:
        """The file `name` of `outline(key)`, now with its content.

        Raises `IntegrityError` if what arrives here is not what was stored.
        """

    @abstractmethod
    def part_of(self, key: str) -> AbstractContextManager[Part]:
        """A new folder to write a part of the folder `key` in; durable, but not visible, when the block ends."""

    @abstractmethod
    def publish(self, key: str, parts: Sequence[Part], still_ours: StillOurs = unguarded) -> None:
        """Make the folder `key` of its stored `parts`, in place of what may stand there; called by one process.

        Raises what `still_ours` does, which is asked last before anything becomes visible.
        """

    @abstractmethod
    def sweep(self, folder: str) -> None:
        """Remove from `folder` the parts of folders that were never published; nobody may be building there."""

    @contextmanager
    def folder_for(self, key: str, still_ours: StillOurs = unguarded) -> Generator[Path]:
        """A new folder to build `key` in; published when the block ends without an error, if it is `still_ours` to do."""
        with self.part_of(key) as part:
            yield part.folder
        self.publish(key, [part], still_ours)

    @abstractmethod
    def exclusive(self, key: str) -> AbstractContextManager[Lock]:
        """Hold the lock `key`; raises `LockedError`, naming the holder, if another process has it."""

    @abstractmethod
    def check_lock(self, key: str, token: str) -> None:
        """Raise `LockedError`, naming the holder, unless the lock `key` is held under `token`; any process may ask."""

    @abstractmethod
    def held(self, key: str) -> bool:
        """Return whether a process holds the lock `key`; asking does not keep another process from taking it."""

    @abstractmethod
    def workspace(self, key: str, names: Sequence[str], still_ours: StillOurs) -> AbstractContextManager[Path]:
        """The folder `key` for one process to work in with plain files, among them those called `names` that are there.

        Where that is not the storage itself, what is written goes there every few seconds while `still_ours`, and at the end.
        """

    @abstractmethod
    def check_writable(self) -> None:
        """Raise `EnvironmentFault` now if the storage cannot be written."""


@contextmanager
def storage_faults(path: Path | str) -> Generator[None]:
    """Turn an operating system error on `path` into an `EnvironmentFault` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise EnvironmentFault(f"disk full at {path}: free some space and run the same job again") from error
        raise EnvironmentFault(f"storage {path}: {error.strerror or error}") from error
