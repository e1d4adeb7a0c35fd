"""Records of shards: one in a commit record each, or many on pages of a manifest."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import IntegrityError
from orchestrator.store.interface import Store
from orchestrator.store.record import Record

PAGE_SHARDS = 512
"""Records on a page: about as many as a very large corpus has pages, so that neither a page nor their list is long."""
_NOTHING = zlib.compress(b"")


class ShardRecord(Record):
    """A committed shard: where it lies in its stage's folder, and what it holds."""

    file: str
    sha256: str
    bytes: int
    rows: int
    footer_bytes: int
    """Bytes of the file's footer, which holds the offsets and hashes of its row groups."""
    footer_sha256: str
    """Proves the footer, and by it every row group, to those who read only a part of the file."""
    rows_sha256: str
    """Hex SHA-256 over all row ids in order: two shards are of the same rows if and only if these are equal."""


class ShardPages(Record):
    """The shards of a corpus: how many rows each has, and pages with their records, which lie beside them.

    The records of a large corpus are gigabytes. Nobody reads them all: the order of training needs the numbers of rows, which
    are kept here, compressed, and whoever reads a shard reads the page that its record stands on.
    """

    folder: str = ""
    """Folder of the shards in the storage."""
    packed_rows: str = ""
    """Rows of each shard: little-endian int32, zlib, base64."""
    pages: tuple[str, ...] = ()
    """Hex SHA-256 of each page, of `PAGE_SHARDS` records."""

    @classmethod
    def of_rows(cls, rows: Sequence[int]) -> ShardPages:
        """Shards of which nothing but the numbers of rows is known, such as those of a plan."""
        return cls(packed_rows=_pack(rows))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of each shard, [shards]."""
        return np.frombuffer(zlib.decompress(base64.b64decode(self.packed_rows) or _NOTHING), "<i4").astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, store: Store, shard: int) -> ShardRecord:
        """The record of `shard`; raises `IntegrityError` if its page is gone or has changed."""
        page, place = divmod(shard, PAGE_SHARDS)
        return ShardRecord.model_validate(self._page(store, page)[place])

    def records(self, store: Store, shards: Iterable[int] | None = None) -> Iterator[ShardRecord]:
        """The records of all shards, or of the `shards` given; each page is read once if those ascend."""
        at, page = -1, list[dict[str, Any]]()
        for shard in range(len(self)) if shards is None else shards:
            if shard // PAGE_SHARDS != at:
                at = shard // PAGE_SHARDS
                page = self._page(store, at)
            yield ShardRecord.model_validate(page[shard % PAGE_SHARDS])

    def _page(self, store: Store, page: int) -> list[dict[str, Any]]:
        key = _page_key(self.folder, page)
        try:
            data = store.read(key)
        except FileNotFoundError as error:
            raise IntegrityError(f"{store.address(key)} is gone; {_again(store, self.folder)}") from error
        if hashlib.sha256(data).hexdigest() != self.pages[page]:
            raise IntegrityError(
                f"{store.address(key)}: sha256 mismatch, it has changed since it was written; {_again(store, self.folder)}"
            )
        return json.loads(data)


class PageWriter:
    """Stores the records of shards that lie in `folder`, page by page, so that they are never all in memory."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._rows, self._pages, self._open = array("i"), list[str](), list[ShardRecord]()

    def add(self, records: Iterable[ShardRecord]) -> None:
        """Append `records`."""
        for record in records:
            self._rows.append(record.rows)
            self._open.append(record)
            if len(self._open) == PAGE_SHARDS:
                self._turn()

    def close(self) -> ShardPages:
        """All that was added, stored."""
        if self._open:
            self._turn()
        return ShardPages(folder=self._folder, packed_rows=_pack(self._rows), pages=tuple(self._pages))

    def _turn(self) -> None:
        data = json.dumps([record.model_dump() for record in self._open], separators=(",", ":")).encode()
        self._store.replace(_page_key(self._folder, len(self._pages)), data)
        self._pages.append(hashlib.sha256(data).hexdigest())
        self._open.clear()


def paged(store: Store, folder: str, records: Iterable[ShardRecord]) -> ShardPages:
    """`records` of shards that lie in `folder`, stored on pages."""
    writer = PageWriter(store, folder)
    writer.add(records)
    return writer.close()


def _page_key(folder: str, page: int) -> str:
    return f"{folder}/pages/{page:06d}.json"


def _pack(rows: Iterable[int]) -> str:
    return base64.b64encode(zlib.compress(np.fromiter(rows, "<i4").tobytes())).decode()


def _again(store: Store, folder: str) -> str:
    return f"remove {store.address(folder.rpartition('/')[0])} and run the job again, which makes the tokens anew"
