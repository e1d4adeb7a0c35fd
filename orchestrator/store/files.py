"""Durable files under one root: written whole or not at all, and never overwritten by a second writer.

This is the only module that writes into the storage. Its three writes are `put_if_absent` (first writer wins; the
building block of every commit), `replace` (the newest whole version wins) and `publish` (a finished folder).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentFault, SpecError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def storage_faults(path: Path) -> Generator[None]:
    """Turn an operating system error on `path` into an `EnvironmentFault` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise EnvironmentFault(f"disk full at {path}: free some space and run the same job again") from error
        raise EnvironmentFault(f"storage {path}: {error.strerror or error}") from error


class Store:
    """A directory tree addressed by keys with `/`; picklable, so that remote workers can carry it."""

    def __init__(self, root: str | Path) -> None:
        if "://" in str(root):
            raise SpecError(f"storage: {root} is not a directory; object stores are not supported yet")
        self.root = Path(root).absolute()

    def path(self, key: str) -> Path:
        path = self.root / key
        assert ".." not in Path(key).parts and not Path(key).is_absolute(), key
        return path

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str) -> bytes:
        """The whole content; raises `FileNotFoundError` for a key that is not there."""
        path = self.path(key)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise EnvironmentFault(f"storage {path}: {error.strerror or error}") from error

    def read_json(self, key: str) -> Any | None:
        """The parsed content, or None for a key that is not there."""
        try:
            return json.loads(self.read(key))
        except FileNotFoundError:
            return None

    def keys(self, folder: str) -> list[str]:
        """Names of the complete files in `folder`, sorted."""
        try:
            names = [path.name for path in self.path(folder).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(n for n in names if not n.startswith(".tmp"))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `data` under `key` unless it is taken; True if this call wrote it. Atomic and durable."""
        path = self.path(key)
        with storage_faults(path):
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
                _sync_folder(path.parent)

    def replace(self, key: str, data: bytes, private: bool = False) -> None:
        """Write `data` under `key`, whatever stood there; `private` for its owner's eyes only. Atomic and durable."""
        path = self.path(key)
        with storage_faults(path):
            temporary = self._write_temporary(path, data)
            try:
                if private:
                    temporary.chmod(0o600)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def publish(self, temporary: Path, key: str) -> None:
        """Move the finished folder `temporary` to `key`, in place of an incomplete one that may stand there."""
        path = self.path(key)
        with storage_faults(path):
            for file in temporary.rglob("*"):
                _sync_file(file)
            if path.exists():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
            _sync_folder(path.parent)

    @contextmanager
    def folder_for(self, key: str) -> Generator[Path]:
        """A temporary folder beside `key` to build in; published as `key` when the block ends without an error."""
        final = self.path(key)
        temporary = final.parent / f".tmp-{uuid.uuid4().hex[:12]}"
        with storage_faults(temporary):
            temporary.mkdir(parents=True)
        try:
            yield temporary
            self.publish(temporary, key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def check_writable(self) -> None:
        """Raise `EnvironmentFault` now if the storage cannot be written."""
        key = f".probe-{uuid.uuid4().hex[:12]}"
        self.put_if_absent(key, b"")
        self.path(key).unlink()

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".tmp-{uuid.uuid4().hex[:12]}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
