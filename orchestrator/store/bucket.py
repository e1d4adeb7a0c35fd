"""Objects in an S3 bucket, with everything that can go wrong on the way there.

Endpoint, region and credentials come from the AWS_* environment variables or the machine's role. Server errors and timeouts are
tried again with growing pauses, reads and plain writes by the client library, conditional writes here: of those a lost
reply must not look like a lost race.
"""

# pyright: reportUnknownMemberType=false
# The stubs of obstore leave the Arrow variants of listings open.

from __future__ import annotations

import io
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store as Client

from orchestrator.errors import EnvironmentFault

RETRIES, RETRIES_AT_START = 10, 3
"""Retries of a request; fewer at the start, where a person waits to hear that an address is wrong."""
FIRST_PAUSE_S, LONGEST_PAUSE_S, GIVE_UP_S = 0.2, 15.0, 180.0
PAUSES_S = (0.5, 2.0, 5.0)
"""Before a conditional write is tried again."""
REQUEST_S, CONNECT_S = 120.0, 5.0
CHUNK_BYTES = 64 << 20
"""Larger files travel in pieces of this size."""
AT_ONCE = 8
"""Files or pieces on their way at the same time."""


class Tagged(NamedTuple):
    """An object as it stood when it was read."""

    data: bytes
    tag: str
    """Its ETag: another after every write."""
    modified: datetime
    """When it was written, by the server's clock."""


class Listed(NamedTuple):
    """An object in a listing."""

    bytes: int
    tag: str


@dataclass(frozen=True)
class Bucket:
    """One bucket, its objects called by their whole names. Raises `EnvironmentFault`, naming the address, if it fails."""

    name: str

    def address(self, name: str) -> str:
        return f"s3://{self.name}/{name}".rstrip("/")

    def read(self, name: str) -> bytes:
        """Raises `FileNotFoundError`."""
        return self.read_tagged(name).data

    def read_tagged(self, name: str) -> Tagged:
        """Raises `FileNotFoundError`."""
        with self._faults(name):
            found = obstore.get(self._client, name)
            tag, modified = found.meta["e_tag"], found.meta["last_modified"]
            assert tag is not None
            return Tagged(bytes(found.bytes()), tag, modified)

    def open(self, name: str) -> io.BufferedReader:
        """For reading here and there; raises `FileNotFoundError`."""
        with self._faults(name):
            return io.BufferedReader(_Remote(self, name, obstore.head(self._client, name)["size"]))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with self._faults(name):
            return bytes(obstore.get_range(self._client, name, start=start, length=length))

    def exists(self, name: str) -> bool:
        with self._faults(name):
            try:
                obstore.head(self._client, name)
                return True
            except FileNotFoundError:
                return False

    def children(self, folder: str) -> list[str]:
        """Names, relative to `folder`, of the objects directly in it."""
        with self._faults(folder):
            objects = obstore.list_with_delimiter(self._client, f"{folder}/" if folder else None)["objects"]
        return [found["path"].rpartition("/")[2] for found in objects]

    def below(self, folder: str) -> dict[str, Listed]:
        """All objects in `folder` and its folders, by whole name."""
        with self._faults(folder):
            objects = obstore.list(self._client, f"{folder}/" if folder else None).collect()
        return {found["path"]: Listed(found["size"], found["e_tag"] or "") for found in objects}

    def write(self, name: str, data: bytes) -> None:
        with self._writing(name):
            obstore.put(self._client, name, data, use_multipart=False)

    def write_if(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Write `data` if the object still has `tag`, or for None if it is not there; its new tag, None if it was refused.

        An object that holds `data` already counts as written, for an earlier reply may have been lost.
        """
        mode: Any = "create" if tag is None else {"e_tag": tag}
        with self._writing(name):
            for pause in (*PAUSES_S, None):
                try:
                    return obstore.put(self._client, name, data, mode=mode, use_multipart=False)["e_tag"]
                except (AlreadyExistsError, PreconditionError):
                    try:
                        standing = self.read_tagged(name)
                    except FileNotFoundError:  # refused for a write that was going on and came to nothing
                        if tag is not None or pause is None:
                            return None
                    else:
                        return standing.tag if standing.data == data else None
                except GenericError:
                    if pause is None:
                        raise
                time.sleep(pause or 0)
        return None

    def upload(self, files: Iterable[tuple[Path, str]]) -> None:
        """Write each file as the object of its name."""

        def one(file: Path, name: str) -> None:
            with self._writing(name):
                obstore.put(self._client, name, file, chunk_size=CHUNK_BYTES, max_concurrency=AT_ONCE)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for future in [pool.submit(one, file, name) for file, name in files]:
                future.result()

    def download(self, objects: Iterable[tuple[str, int, Path]]) -> None:
        """Read each object, of so many bytes, into a new file; raises `FileNotFoundError`."""

        def piece(name: str, start: int, length: int, file: Path) -> None:
            data = self.read_range(name, start, length)
            with file.open("r+b") as opened:
                opened.seek(start)
                opened.write(data)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            waiting: list[Future[None]] = []
            for name, size, file in objects:
                file.touch()
                starts = range(0, size, CHUNK_BYTES)
                waiting += [pool.submit(piece, name, s, min(CHUNK_BYTES, size - s), file) for s in starts]
            for future in waiting:
                future.result()

    def remove(self, names: Sequence[str]) -> None:
        """Remove the objects, as far as they are there."""
        if names:
            with self._writing(names[0]):
                obstore.delete(self._client, names)

    def check_writable(self, name: str) -> None:
        """Raise `EnvironmentFault` if the bucket cannot be written, or takes the same name twice: commits rely on that."""
        client = _client(self.name, RETRIES_AT_START)
        with self._writing(name):
            obstore.put(client, name, b"1", mode="create", use_multipart=False)
            try:
                obstore.put(client, name, b"2", mode="create", use_multipart=False)
            except AlreadyExistsError:
                return
            finally:
                obstore.delete(client, name)
        raise EnvironmentFault(f"storage {self.address(name)}: this server ignores If-None-Match, which commits rely on")

    @property
    def _client(self) -> Client:
        return _client(self.name, RETRIES)

    @contextmanager
    def _writing(self, name: str) -> Generator[None]:
        try:
            with self._faults(name):
                yield
        except FileNotFoundError as error:
            raise EnvironmentFault(f"storage {self.address(name)}: there is no bucket {self.name!r}") from error

    @contextmanager
    def _faults(self, name: str) -> Generator[None]:
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise EnvironmentFault(f"storage {self.address(name)}: access denied: {_brief(error)}") from error
        except BaseError as error:
            raise EnvironmentFault(f"storage {self.address(name)}: {_brief(error)}") from error


class _Remote(io.RawIOBase):
    """An object as a file that can be read from anywhere."""

    def __init__(self, bucket: Bucket, name: str, size: int) -> None:
        self._bucket, self._name, self._size, self._at = bucket, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        buffer[:length] = self._bucket.read_range(self._name, self._at, length)
        self._at += length
        return length


@cache
def _client(bucket: str, retries: int) -> Client:
    """One a process: it holds the connections."""
    return Client(
        bucket,
        client_options={
            "timeout": timedelta(seconds=REQUEST_S),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "allow_http": True,  # for an endpoint that says so
        },
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=GIVE_UP_S),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_PAUSE_S),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE_S),
                "base": 2,
            },
        },
    )


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0]
