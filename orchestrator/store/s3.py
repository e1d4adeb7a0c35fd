"""Storage in an S3 bucket.

    <key>                a file
    <key>/<name>         the files of a folder, which is finished once there is
    <key>.index.json     what they are: written last, by `publish`

Programs that want files get a copy of the folder on their node, made once and checked against the index.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import EnvironmentFault, IntegrityError, SpecError
from orchestrator.store.bucket import Bucket
from orchestrator.store.file_record import FileRecord, describe_rest, sha256_of
from orchestrator.store.interface import UNFINISHED, Lock, Part, StillOurs, Store, storage_faults, unguarded
from orchestrator.store.lease import check, held, lease
from orchestrator.store.mirror import mirrored

INDEX = ".index.json"


class FolderIndex(BaseModel):
    """The files of a finished folder, by relative name."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    files: dict[str, FileRecord]
    tags: dict[str, str]
    """ETags of their objects: what has another is damaged."""

    @property
    def content(self) -> str:
        """Hex identity, of as many digits as tell folders apart."""
        return _digest(self.model_dump_json())


class S3Store(Store):
    def __init__(self, root: str) -> None:
        name, _, self._prefix = root.removeprefix("s3://").strip("/").partition("/")
        if not name:
            raise SpecError(f"{root} names no bucket: s3://bucket/prefix")
        self._bucket = Bucket(name)

    def address(self, key: str = "") -> str:
        return self._bucket.address(self._name(key))

    def exists(self, key: str) -> bool:
        return self._bucket.exists(self._name(key)) or self._bucket.exists(self._name(key) + INDEX)

    def read(self, key: str) -> bytes:
        return self._bucket.read(self._name(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._bucket.read_range(self._name(key), start, length)

    def open(self, key: str) -> BinaryIO:
        return self._bucket.open(self._name(key))

    def keys(self, folder: str) -> list[str]:
        return sorted(name.removesuffix(INDEX) for name in self._bucket.children(self._name(folder)))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._bucket.write_if(self._name(key), data, tag=None) is not None

    def replace(self, key: str, data: bytes, private: bool = False) -> None:
        self._bucket.write(self._name(key), data)

    def remove(self, key: str) -> None:
        name = self._name(key)
        below = list(self._bucket.below(name))
        # Indexes first: a folder must not lose its files before its name.
        self._bucket.remove([name, name + INDEX, *(found for found in below if found.endswith(INDEX))])
        self._bucket.remove(below)

    def contents(self, key: str) -> dict[str, FileRecord] | None:
        index, folder = self._index(key), self._name(key)
        if index is None:
            return None
        there = self._bucket.below(folder)
        for name, record in index.files.items():
            if there.get(f"{folder}/{name}") != (record.bytes, index.tags[name]):
                return None
        return index.files

    def local(self, key: str) -> Path:
        index, copies = self._index(key), self._copies(key)
        if index is None:
            raise FileNotFoundError(self.address(key))
        copy = copies.with_name(f"{copies.name}-{index.content}")
        with storage_faults(copy), copy.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes on a node, one downloads
            if not copy.is_dir():
                self._copy(key, index, copy)
        return copy

    def holds(self, key: str, files: Mapping[str, FileRecord]) -> bool:
        try:
            index, folder = self._index(key), self._name(key)
        except IntegrityError:
            return False
        if index is None:
            return False
        there = self._bucket.below(folder)
        return all(
            index.files.get(name) == record and there.get(f"{folder}/{name}") == (record.bytes, index.tags[name])
            for name, record in files.items()
        )

    def outline(self, key: str) -> Path:
        index = self._index(key)
        if index is None:
            raise FileNotFoundError(self.address(key))
        outline = self._outline(key, index)
        with storage_faults(outline), outline.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not outline.is_dir():
                partial = outline.with_name(f"{UNFINISHED}-{uuid.uuid4().hex[:12]}")
                partial.mkdir()
                self._make_folders(key, index, partial)
                for name in index.files:
                    (partial / name).touch()
                partial.rename(outline)
        return outline

    def fetch(self, key: str, name: str) -> Path:
        index = self._index(key)
        if index is None:
            raise IntegrityError(f"{self.address(key)}: it is gone")
        file, record = self._outline(key, index) / name, index.files[name]
        with storage_faults(file), file.with_name(f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes on a node, one downloads
            if file.stat().st_size != record.bytes:
                partial = file.with_name(f"{UNFINISHED}-{file.name}")
                self._download({name: record}, key, {name: partial})
                partial.replace(file)
        return file

    def forget(self, key: str) -> None:
        copies = self._copies(key)
        for copy in copies.parent.glob(f"{copies.name}-*"):
            if copy.is_dir():
                shutil.rmtree(copy, ignore_errors=True)

    @contextmanager
    def part_of(self, key: str) -> Generator[Part]:
        part = Part(node_folder() / f"part-{uuid.uuid4().hex[:12]}")
        with storage_faults(part.folder):
            part.folder.mkdir()
        try:
            yield part
            part.files.update(describe_rest(part.folder, part.files))
            folder = self._name(key)
            self._bucket.upload((part.folder / name, f"{folder}/{name}") for name in part.files)
        finally:
            shutil.rmtree(part.folder, ignore_errors=True)

    def publish(self, key: str, parts: Sequence[Part], still_ours: StillOurs = unguarded) -> None:
        files, folder = {name: record for part in parts for name, record in part.files.items()}, self._name(key)
        there = self._bucket.below(folder)
        index = FolderIndex(files=files, tags={name: there[f"{folder}/{name}"].tag for name in files})
        still_ours()
        self._bucket.write(folder + INDEX, index.model_dump_json(indent=1).encode())

    def sweep(self, folder: str) -> None:
        finished, start = self.keys(folder), f"{self._name(folder)}/"
        inside = [path for path in self._bucket.below(start[:-1]) if "/" in path.removeprefix(start)]
        self._bucket.remove([path for path in inside if path.removeprefix(start).partition("/")[0] not in finished])

    def exclusive(self, key: str) -> AbstractContextManager[Lock]:
        return lease(self._bucket, self._name(key))

    def check_lock(self, key: str, token: str) -> None:
        check(self._bucket, self._name(key), token)

    def held(self, key: str) -> bool:
        return held(self._bucket, self._name(key))

    def workspace(self, key: str, names: Sequence[str], still_ours: StillOurs) -> AbstractContextManager[Path]:
        return mirrored(self, key, names, still_ours, node_folder())

    def check_writable(self) -> None:
        self._bucket.check_writable(self._name(f".probe-{uuid.uuid4().hex[:12]}"))

    def _name(self, key: str) -> str:
        assert ".." not in key.split("/") and not key.startswith("/"), key
        return "/".join(part for part in (self._prefix, key) if part)

    def _index(self, key: str) -> FolderIndex | None:
        try:
            return FolderIndex.model_validate_json(self._bucket.read(self._name(key) + INDEX))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise IntegrityError(f"{self.address(key)}{INDEX}: not a valid record: {error.errors()[0]['msg']}") from error

    def _copies(self, key: str) -> Path:
        """Return the prefix of the names of this node's copies of the folder `key`."""
        return node_folder() / "copies" / _digest(self.address(key))

    def _outline(self, key: str, index: FolderIndex) -> Path:
        copies = self._copies(key)
        return copies.with_name(f"{copies.name}-{index.content}-outline")

    def _copy(self, key: str, index: FolderIndex, copy: Path) -> None:
        partial = copy.with_name(f"{UNFINISHED}-{uuid.uuid4().hex[:12]}")
        try:
            partial.mkdir()
            self._make_folders(key, index, partial)
            self._download(index.files, key, {name: partial / name for name in index.files})
            partial.rename(copy)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make_folders(self, key: str, index: FolderIndex, root: Path) -> None:
        for name in index.files:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise IntegrityError(f"{self.address(key)}{INDEX}: {name} is no file of a folder of ours")
            (root / name).parent.mkdir(parents=True, exist_ok=True)

    def _download(self, files: Mapping[str, FileRecord], key: str, targets: Mapping[str, Path]) -> None:
        """Read `files` of the folder `key` into the new files `targets`, by relative name, and check them."""
        folder = self._name(key)
        try:
            self._bucket.download((f"{folder}/{name}", record.bytes, targets[name]) for name, record in files.items())
        except FileNotFoundError as error:
            raise IntegrityError(f"{self.address(key)}: a file of it is gone: {error}") from error
        for name, record in files.items():
            if sha256_of(targets[name]) != record.sha256:
                raise IntegrityError(f"{self.address(key)}/{name}: sha256 mismatch, it has changed since it was written")


def node_folder() -> Path:
    """This user's folder on this node ($TMPDIR) for copies and for what is on its way to the storage."""
    folder = Path(tempfile.gettempdir()) / f"distill-{os.getuid()}"
    with storage_faults(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise EnvironmentFault(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
        (folder / "copies").mkdir(exist_ok=True)
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
