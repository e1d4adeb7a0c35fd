"""How tokens, order and books were kept before row groups (commit 06bb91c), to measure beside what is there now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.plan.order import shuffled
from orchestrator.store.interface import Store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.shard_pages import ShardRecord


class OldRecord(BaseModel):
    file: str
    sha256: str
    rows: int
    bytes: int


class OldManifest(BaseModel):
    """A record for each shard, all in one file."""

    train: tuple[OldRecord, ...]


def save(store: Store, key: str, records: Iterable[ShardRecord]) -> None:
    made = (OldRecord(file=r.file, sha256=r.sha256, rows=r.rows, bytes=r.bytes).model_dump_json().encode() for r in records)
    store.replace(key, b'{"train": [' + b",\n".join(made) + b"]}")


def load(store: Store, key: str) -> OldManifest:
    return OldManifest.model_validate_json(store.read(key))


def content(manifest: OldManifest) -> str:
    return fingerprint("tokens", "", [s.sha256 for s in manifest.train], [])


class Order:
    """Shards in turn, rows inside a shard in turn."""

    def __init__(self, shard_rows: Sequence[int], global_batch: int) -> None:
        self._rows, self._batch = np.asarray(shard_rows, dtype=np.int64), global_batch
        self._shards = shuffled(len(self._rows), 0, 0)
        self._starts = np.concatenate([[0], np.cumsum(self._rows[self._shards])[:-1]])

    def share(self, step: int, rank: int, world: int) -> list[tuple[int, int]]:
        each = self._batch // world
        first = step * self._batch + rank * each
        slots = np.searchsorted(self._starts, np.arange(first, first + each), side="right") - 1
        return [(int(self._shards[slot]), first + i - int(self._starts[slot])) for i, slot in enumerate(slots)]


def ledger(log: LabelLog, shards: Sequence[int]) -> int:
    """Distinct rows, counted from the row ids of every shard."""
    found: list[Any] = []
    for shard in shards:
        record = log.committed(shard)
        assert record is not None
        with (
            log.store.open(f"{log.folder}/data/{record.file}") as data,
            pq.ParquetFile(data, page_checksum_verification=True) as file,
        ):
            found.append(file.read(columns=["row_id"], use_threads=False)["row_id"].combine_chunks())
    identity: Any = pa.binary(16)
    return pc.count_distinct(pa.chunked_array(found, identity)).as_py()
