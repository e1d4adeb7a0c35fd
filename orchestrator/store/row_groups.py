"""Shards as Parquet files of row groups, each of which is hashed, fetched and decoded by itself.

A file's footer says where its row groups lie and what their hashes are; the shard's record proves the footer. So whoever needs
a few rows reads the footer and the groups of these rows, and still knows that every byte is as it was written. Page checksums
are on as well, for other readers of Parquet.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import IntegrityError
from orchestrator.store.interface import Store
from orchestrator.store.shard_pages import ShardRecord

GROUPS = "row_groups"
"""Key of the footer's metadata under which the row groups are listed."""
MAGIC_BYTES = 4
"""Number of bytes in the magic number at the start of a Parquet file."""


class RowGroup(NamedTuple):
    """The location of a row group in its file, and its contents."""

    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Footer:
    """The end of a shard's file."""

    metadata: Any
    """Parquet's own."""
    groups: tuple[RowGroup, ...]


def to_parquet(groups: Sequence[pa.Table]) -> tuple[bytes, int]:
    """One Parquet file with a row group for each table, and how many bytes its footer takes.

    Without statistics: of a column of bytes they are its longest values over again, several bytes a token.
    """
    sink, listed = io.BytesIO(), list[RowGroup]()
    layout: dict[str, Any] = {"write_statistics": False, "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(sink, groups[0].schema, compression="zstd", **layout) as writer:
        for table in groups:
            start = sink.tell()
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            written = sink.getbuffer()[start:]
            listed.append(RowGroup(start, len(written), hashlib.sha256(written).hexdigest()))
            written.release()
        writer.add_key_value_metadata({GROUPS: json.dumps(listed)})
    data = sink.getvalue()
    return data, len(data) - listed[-1].start - listed[-1].bytes


def put_shard(store: Store, folder: str, index: int, groups: Sequence[pa.Table]) -> ShardRecord:
    """Store `groups` under a name that holds the file's hash; visible to nobody until a record names it."""
    data, footer_bytes = to_parquet(groups)
    digest = hashlib.sha256(data).hexdigest()
    file = f"{index:06d}-{digest[:32]}.parquet"
    store.put_if_absent(f"{folder}/{file}", data)
    return ShardRecord(
        file=file,
        sha256=digest,
        bytes=len(data),
        rows=sum(table.num_rows for table in groups),
        footer_bytes=footer_bytes,
        footer_sha256=hashlib.sha256(data[-footer_bytes:]).hexdigest(),
        rows_sha256=rows_sha256([row_id for table in groups for row_id in binary_column(table, "row_id")]),
    )


def rows_sha256(row_ids: Sequence[bytes]) -> str:
    """Return the hash in a shard's record that identifies its rows."""
    return hashlib.sha256(b"".join(row_ids)).hexdigest()


class ShardFile:
    """The file of a committed shard; raises `IntegrityError`, beginning with `where`, if it is gone or has changed."""

    def __init__(self, store: Store, folder: str, record: ShardRecord, where: str) -> None:
        self.record, self.where = record, where
        self._store, self._key = store, f"{folder}/{record.file}"

    @cached_property
    def footer(self) -> Footer:
        """Read once."""
        record = self.record
        data = self._range(record.bytes - record.footer_bytes, record.footer_bytes, record.footer_sha256)
        metadata: Any = pq.read_metadata(pa.BufferReader(data))
        groups = tuple(RowGroup(*group) for group in json.loads(metadata.metadata[GROUPS.encode()]))
        assert metadata.num_row_groups == len(groups)
        if metadata.num_rows != record.rows:
            raise IntegrityError(f"{self.where}: {metadata.num_rows} rows where {record.rows} were committed")
        return Footer(metadata, groups)

    def group(self, number: int) -> pa.Table:
        """Row group `number`; nothing else of the file is read."""
        start, length, digest = self.footer.groups[number]
        data = self._range(start, length, digest)
        # The group at its place in a file that is otherwise a hole: pages that are never touched take no memory.
        sparse: Any = np.zeros(self.record.bytes, np.uint8)
        sparse[start : start + length] = np.frombuffer(data, np.uint8)
        # Not from a Python object: a thread of arrow that still holds one when the interpreter ends aborts the process.
        source = pa.BufferReader(pa.py_buffer(sparse))
        with pq.ParquetFile(source, metadata=self.footer.metadata, page_checksum_verification=True) as file:
            return file.read_row_group(number, use_threads=False)

    def groups(self) -> list[pa.Table]:
        """All row groups, of a file that is read as a whole."""
        data = self._read()
        if hashlib.sha256(data).hexdigest() != self.record.sha256:
            raise self._changed()
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            if file.metadata.num_rows != self.record.rows:
                raise IntegrityError(f"{self.where}: {file.metadata.num_rows} rows where {self.record.rows} were committed")
            return [file.read_row_group(number, use_threads=False) for number in range(file.num_row_groups)]

    def table(self) -> pa.Table:
        """All rows."""
        return pa.concat_tables(self.groups())

    def look(self) -> None:
        """Read the end of the file alone and see that it is the one of the record."""
        self._range(self.record.bytes - self.record.footer_bytes, self.record.footer_bytes, self.record.footer_sha256)

    def check(self) -> None:
        """Read everything, in both ways, and compare it with what the record says."""
        tables = self.groups()
        for number, table in enumerate(tables):
            if not self.group(number).equals(table):
                raise self._changed()
        if rows_sha256([row_id for table in tables for row_id in binary_column(table, "row_id")]) != self.record.rows_sha256:
            raise IntegrityError(f"{self.where}: it holds other rows than were committed")

    def _range(self, start: int, length: int, digest: str) -> bytes:
        data = self._read(start, length)
        if hashlib.sha256(data).hexdigest() != digest:
            raise self._changed()
        return data

    def _read(self, *part: int) -> bytes:
        try:
            return self._store.read_range(self._key, *part) if part else self._store.read(self._key)
        except FileNotFoundError as error:
            raise IntegrityError(f"{self.where}: the file {self.record.file} is gone") from error

    def _changed(self) -> IntegrityError:
        return IntegrityError(f"{self.where}: sha256 mismatch, the file has changed since it was written")


def binary_column(table: pa.Table, name: str) -> list[bytes]:
    """The values of a column of bytes, one per row."""
    values: Any = table[name].to_pylist()
    return values
