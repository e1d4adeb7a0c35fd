"""Storage in a directory, which all nodes share if there are several."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import EnvironmentFault
from orchestrator.store.file_record import FileRecord, describe_folder, describe_rest, sha256_of
from orchestrator.store.interface import UNFINISHED, Lock, Part, StillOurs, Store, storage_faults, unguarded
from orchestrator.store.lock import check, exclusive, held


class LocalStore(Store):
    """A storage in a local folder. A file that is being written is called `.tmp-...` and seen by nobody; it gets its final name
    by link(2) or rename(2)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def path(self, key: str) -> Path:
        path = self.root / key
        assert ".." not in Path(key).parts and not Path(key).is_absolute(), key
        return path

    def address(self, key: str = "") -> str:
        return str(self.path(key))

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def read(self, key: str) -> bytes:
        with _faults_of_present(self.path(key)):
            return self.path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with _faults_of_present(self.path(key)), self.path(key).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)

    def open(self, key: str) -> BinaryIO:
        with _faults_of_present(self.path(key)):
            return self.path(key).open("rb")

    def keys(self, folder: str) -> list[str]:
        try:
            names = [path.name for path in self.path(folder).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(n for n in names if not n.startswith(UNFINISHED))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.path(key)
        with storage_faults(path):
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return path.read_bytes() == data
            finally:
                temporary.unlink()
                _sync_folder(path.parent)

    def replace(self, key: str, data: bytes, private: bool = False) -> None:
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

    def remove(self, key: str) -> None:
        path = self.path(key)
        with storage_faults(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def contents(self, key: str) -> dict[str, FileRecord] | None:
        path = self.path(key)
        return describe_folder(path) if path.is_dir() else None

    def local(self, key: str) -> Path:
        path = self.path(key)
        if not path.is_dir():
            raise FileNotFoundError(path)
        return path

    def forget(self, key: str) -> None:
        pass

    def holds(self, key: str, files: Mapping[str, FileRecord]) -> bool:
        folder = self.path(key)
        with storage_faults(folder):
            try:
                return all(
                    (folder / name).stat().st_size == record.bytes and sha256_of(folder / name) == record.sha256
                    for name, record in files.items()
                )
            except FileNotFoundError:
                return False

    def outline(self, key: str) -> Path:
        return self.local(key)

    def fetch(self, key: str, name: str) -> Path:
        return self.path(key) / name

    @contextmanager
    def part_of(self, key: str) -> Generator[Part]:
        path = self.path(key)
        part = Part(path.parent / f"{UNFINISHED}-{path.name}-{uuid.uuid4().hex[:12]}")
        with storage_faults(part.folder):
            part.folder.mkdir(parents=True)
        try:
            yield part
            with storage_faults(part.folder):
                _open_to_all_that_umask_lets(part.folder)
                part.files.update(describe_rest(part.folder, part.files))
                for file in part.folder.rglob("*"):
                    _sync_file(file)
        except BaseException:
            shutil.rmtree(part.folder, ignore_errors=True)
            raise

    def publish(self, key: str, parts: Sequence[Part], still_ours: StillOurs = unguarded) -> None:
        path, whole = self.path(key), parts[0].folder
        try:
            with storage_faults(path):
                for part in parts[1:]:
                    for name in part.files:
                        (whole / name).parent.mkdir(parents=True, exist_ok=True)
                        (part.folder / name).rename(whole / name)
                for folder in (whole, *(below for below in whole.rglob("*") if below.is_dir())):
                    _sync_folder(folder)
                still_ours()
                if path.exists():
                    shutil.rmtree(path)
                whole.rename(path)
                _sync_folder(path.parent)
        finally:
            for part in parts:
                shutil.rmtree(part.folder, ignore_errors=True)

    def sweep(self, folder: str) -> None:
        for path in self.path(folder).glob(f"{UNFINISHED}-*"):
            shutil.rmtree(path)

    def exclusive(self, key: str) -> AbstractContextManager[Lock]:
        return exclusive(self.path(key))

    def check_lock(self, key: str, token: str) -> None:
        check(self.path(key), token)

    def held(self, key: str) -> bool:
        return held(self.path(key))

    @contextmanager
    def workspace(self, key: str, names: Sequence[str], still_ours: StillOurs) -> Generator[Path]:
        path = self.path(key)
        with storage_faults(path):
            path.mkdir(parents=True, exist_ok=True)
        yield path

    def check_writable(self) -> None:
        key = f".probe-{uuid.uuid4().hex[:12]}"
        self.put_if_absent(key, b"")
        self.remove(key)

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


@contextmanager
def _faults_of_present(path: Path) -> Generator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EnvironmentFault(f"storage {path}: {error.strerror or error}") from error


def _open_to_all_that_umask_lets(folder: Path) -> None:
    """Give the files in `folder`, a folder just made, the modes that umask gives new ones.

    Libraries write some for their owner alone (safetensors), and copies keep the mode of what was copied.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _temporary(path: Path) -> Path:
    return path.parent / f"{UNFINISHED}-{uuid.uuid4().hex[:12]}"


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
