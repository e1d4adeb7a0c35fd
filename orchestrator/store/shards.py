"""Shards as Parquet bytes, and the schema of token shards. Page checksums on; every read is checked against a hash."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import IntegrityError
from orchestrator.store.files import Store
from orchestrator.store.records import ShardRecord

ROW_ID_BYTES = 16
TOKEN_SCHEMA_VERSION = 3


def to_parquet(table: pa.Table) -> bytes:
    """`table` as the bytes of one Parquet file: zstd, page checksums, one row group.

    Without statistics: of a column of bytes they are its longest values over again, several bytes a token.
    """
    sink = io.BytesIO()
    layout: dict[str, Any] = {"row_group_size": max(1, table.num_rows), "write_statistics": False, "use_dictionary": False}
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **layout)
    return sink.getvalue()


def from_parquet(data: bytes, record: ShardRecord, where: str) -> pa.Table:
    """The table in `data`; raises `IntegrityError` naming `where` if a byte differs from what was committed."""
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise IntegrityError(f"{where}: sha256 mismatch, the file has changed since it was written")
    # Not from a Python object: a thread of arrow that still holds one when the interpreter ends aborts the process.
    table = pq.read_table(pa.BufferReader(data), use_threads=False, page_checksum_verification=True)
    if table.num_rows != record.rows:
        raise IntegrityError(f"{where}: {table.num_rows} rows where {record.rows} were committed")
    return table


def put_shard(store: Store, folder: str, index: int, table: pa.Table) -> ShardRecord:
    """Store `table` under a name that holds its content hash; visible to nobody until a record names it."""
    data = to_parquet(table)
    digest = hashlib.sha256(data).hexdigest()
    file = f"{index:06d}-{digest[:32]}.parquet"
    store.put_if_absent(f"{folder}/{file}", data)
    return ShardRecord(file=file, sha256=digest, rows=table.num_rows, bytes=len(data))


def get_shard(store: Store, folder: str, record: ShardRecord, where: str) -> pa.Table:
    """Read back what `put_shard` stored; raises `IntegrityError` if it is gone or differs."""
    try:
        data = store.read(f"{folder}/{record.file}")
    except FileNotFoundError as error:
        raise IntegrityError(f"{where}: the file {record.file} is gone") from error
    return from_parquet(data, record, where)


def get_row_ids(store: Store, folder: str, record: ShardRecord, where: str) -> pa.Array[Any]:
    """The row ids of a committed shard, read without its other columns; raises `IntegrityError` if they are gone or damaged."""
    try:
        with (
            store.open(f"{folder}/{record.file}") as data,
            pq.ParquetFile(data, page_checksum_verification=True) as file,
        ):
            return file.read(columns=["row_id"], use_threads=False)["row_id"].combine_chunks()
    except FileNotFoundError as error:
        raise IntegrityError(f"{where}: the file {record.file} is gone") from error
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{where}: {record.file} is damaged: {error}") from error


@dataclass(frozen=True)
class TokenShard:
    """Rows of one token shard."""

    row_ids: list[bytes]
    """16 bytes each, from document hash and position."""
    ids: npt.NDArray[np.int32]
    """[rows, seq_len + 1]"""
    loss_mask: npt.NDArray[np.bool_] | None = None
    """[rows, seq_len]: whether ids[:, t + 1] is learnt; None: all are."""
    documents: list[bytes] | None = None
    """16 bytes each, from the hash of the document that the row's first target belongs to; held-out rows have them."""

    def to_table(self) -> pa.Table:
        width = self.ids.shape[1]
        columns: dict[str, Any] = {
            "row_id": pa.array(self.row_ids, pa.binary(ROW_ID_BYTES)),
            "ids": pa.FixedSizeListArray.from_arrays(pa.array(self.ids.reshape(-1), pa.int32()), width),
        }
        if self.loss_mask is not None:
            columns["loss_mask"] = pa.FixedSizeListArray.from_arrays(pa.array(self.loss_mask.reshape(-1)), width - 1)
        if self.documents is not None:
            columns["document"] = pa.array(self.documents, pa.binary(ROW_ID_BYTES))
        return pa.table(columns).replace_schema_metadata({"schema_version": str(TOKEN_SCHEMA_VERSION)})

    @classmethod
    def from_table(cls, table: pa.Table) -> TokenShard:
        mask = _matrix(table, "loss_mask").astype(np.bool_) if "loss_mask" in table.column_names else None
        documents = binary_column(table, "document") if "document" in table.column_names else None
        return cls(binary_column(table, "row_id"), _matrix(table, "ids").astype(np.int32), mask, documents)

    def counted(self) -> npt.NDArray[np.bool_]:
        """Which targets count, [rows, seq_len]: all but those of a prompt."""
        return np.ones_like(self.ids[:, 1:], dtype=np.bool_) if self.loss_mask is None else self.loss_mask

    def rows(self, some: slice) -> TokenShard:
        """Some of its rows."""
        mask = None if self.loss_mask is None else self.loss_mask[some]
        documents = None if self.documents is None else self.documents[some]
        return TokenShard(self.row_ids[some], self.ids[some], mask, documents)

    def ids_sha256(self) -> list[bytes]:
        """First 16 bytes of the SHA-256 of each row's ids, little-endian int32."""
        return [hashlib.sha256(row.astype("<i4").tobytes()).digest()[:ROW_ID_BYTES] for row in self.ids]


def _matrix(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of lists of one length, [rows, length]."""
    lists: Any = table[name].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)


def binary_column(table: pa.Table, name: str) -> list[bytes]:
    """The values of a column of bytes, one per row."""
    values: Any = table[name].to_pylist()
    return values


def read_tokens(store: Store, folder: str, record: ShardRecord) -> TokenShard:
    """One token shard, verified."""
    try:
        return TokenShard.from_table(get_shard(store, folder, record, f"token shard {folder}/{record.file}"))
    except IntegrityError as error:
        tokens = store.address(folder.rpartition("/")[0])
        raise IntegrityError(f"{error}; remove {tokens} and run the job again, which makes the tokens anew") from error
