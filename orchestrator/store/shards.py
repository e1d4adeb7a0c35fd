"""The schema of token shards, and how one is read: as a whole, or a row group of it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.errors import IntegrityError
from orchestrator.store.interface import Store
from orchestrator.store.row_groups import ShardFile, binary_column, put_shard
from orchestrator.store.shard_pages import ShardRecord

ROW_ID_BYTES = 16
TOKEN_SCHEMA_VERSION = 4


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


def joined(parts: Sequence[TokenShard]) -> TokenShard:
    """The rows of all `parts`, which have the same columns."""
    masks = [part.loss_mask for part in parts if part.loss_mask is not None]
    documents = [document for part in parts for document in part.documents or ()]
    return TokenShard(
        [row for part in parts for row in part.row_ids],
        np.concatenate([part.ids for part in parts]),
        np.concatenate(masks) if masks else None,
        documents or None,
    )


def _matrix(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of lists of one length, [rows, length]."""
    lists: Any = table[name].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)


def put_tokens(store: Store, folder: str, index: int, tokens: TokenShard, group_rows: int) -> ShardRecord:
    """Store `tokens` as the `index`-th shard of `folder`, in row groups of `group_rows`."""
    starts = range(0, len(tokens.row_ids), group_rows)
    return put_shard(store, folder, index, [tokens.rows(slice(start, start + group_rows)).to_table() for start in starts])


def token_file(store: Store, folder: str, record: ShardRecord) -> ShardFile:
    """The file of a token shard, to read row groups of."""
    return ShardFile(store, folder, record, f"token shard {folder}/{record.file}")


def read_tokens(store: Store, folder: str, record: ShardRecord) -> TokenShard:
    """One token shard, verified."""
    with made_anew(store, folder):
        return TokenShard.from_table(token_file(store, folder, record).table())


def read_rows(store: Store, folder: str, record: ShardRecord, rows: range, group_rows: int) -> TokenShard:
    """Some rows of a token shard, of which only their row groups are read and verified."""
    groups = range(rows.start // group_rows, -(-rows.stop // group_rows))
    with made_anew(store, folder):
        file = token_file(store, folder, record)
        found = joined([TokenShard.from_table(file.group(number)) for number in groups])
    first = groups.start * group_rows
    return found.rows(slice(rows.start - first, rows.stop - first))


@contextmanager
def made_anew(store: Store, folder: str) -> Generator[None]:
    """Have a damaged or missing token shard in `folder` say how it is made again."""
    try:
        yield
    except IntegrityError as error:
        tokens = store.address(folder.rpartition("/")[0])
        raise IntegrityError(f"{error}; remove {tokens} and run the job again, which makes the tokens anew") from error
