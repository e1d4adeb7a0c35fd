"""The books of the label log: a demand is sealed when every row of it is there, once."""

from __future__ import annotations

import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store import label_log
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import ShardRecord
from orchestrator.store.shards import TokenShard
from tests.label_logs import commit_all, flip, manifest_of, tokens_of


@pytest.fixture
def shards() -> list[TokenShard]:
    return [tokens_of(shard, rows=3 + shard) for shard in range(4)]


def test_a_complete_demand_is_sealed(log: LabelLog, shards: list[TokenShard]) -> None:
    records, manifest = commit_all(log, shards), manifest_of(shards)
    seal, ledger = log.seal([3, 1, 0], manifest)
    assert (ledger.planned, ledger.committed, ledger.quarantined, ledger.duplicates) == (13, 13, 0, 0)
    assert (seal.key, seal.shards, seal.rows) == (log.key, 3, 13)
    assert seal.bytes == sum(log.store.path(f"{log.folder}/data/{records[s].file}").stat().st_size for s in (3, 1, 0))
    assert log.seal([3, 1, 0], manifest) == (seal, ledger)
    assert log.seal([0, 1, 2, 3], manifest)[0].content != seal.content
    assert len(log.store.keys(f"{log.folder}/seals")) == 2


def test_a_missing_shard_does_not_balance(log: LabelLog, shards: list[TokenShard]) -> None:
    commit_all(log, shards[:3])
    with pytest.raises(IntegrityError, match="planned 18, committed 12, quarantined 0, duplicates 0") as caught:
        log.seal([0, 1, 2, 3], manifest_of(shards))
    assert caught.value.exit_code == 5
    assert log.store.keys(f"{log.folder}/seals") == []


def craft(log: LabelLog, record: ShardRecord, row_ids: list[bytes]) -> None:
    """Put a valid Parquet file with other row ids in the place of a committed one."""
    table = pa.table({"row_id": pa.array(row_ids, pa.binary(16))})
    pq.write_table(table, log.store.path(f"{log.folder}/data/{record.file}"))


def test_a_doubled_row_does_not_balance(log: LabelLog, shards: list[TokenShard]) -> None:
    records = commit_all(log, shards)
    craft(log, records[2], [shards[1].row_ids[0], *shards[2].row_ids[1:]])
    with pytest.raises(IntegrityError, match="planned 18, committed 17, quarantined 0, duplicates 1"):
        log.seal([0, 1, 2, 3], manifest_of(shards))
    assert log.ledger([0, 2, 3], manifest_of(shards))[0].balanced, "the double is in shard 1"


@pytest.mark.parametrize("rows", [4, 6])
def test_a_lost_or_added_row_does_not_balance(log: LabelLog, shards: list[TokenShard], rows: int) -> None:
    records = commit_all(log, shards)
    craft(log, records[2], [f"row {i}".encode().ljust(16) for i in range(rows)])
    with pytest.raises(IntegrityError, match=f"planned 18, committed {13 + rows}"):
        log.seal([0, 1, 2, 3], manifest_of(shards))


def test_books_of_many_shards_are_kept_in_order(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_log, "SHARDS_A_READER", 3)
    many = [tokens_of(shard, rows=1 + shard % 3) for shard in range(20)]
    records, manifest = commit_all(log, many), manifest_of(many)
    demand = [*range(13, 20), *range(11)]
    ledger, found = log.ledger(demand, manifest)
    assert found == [records[shard] for shard in demand]
    assert ledger.balanced and ledger.committed == sum(record.rows for record in found)
    log.store.path(f"{log.folder}/commits/000004.json").unlink()
    ledger, found = log.ledger(demand, manifest)
    assert found == [records[shard] for shard in demand if shard != 4]
    assert (ledger.planned - ledger.committed, ledger.duplicates) == (records[4].rows, 0)


@pytest.mark.parametrize("damage", ["truncated", "gone", "row id column", "footer"])
def test_a_damaged_file_is_not_sealed(log: LabelLog, shards: list[TokenShard], damage: str) -> None:
    records = commit_all(log, shards)
    file = log.store.path(f"{log.folder}/data/{records[1].file}")
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, records[1].bytes // 2)
    else:
        column = pq.ParquetFile(file).metadata.row_group(0).column(0)
        middle = column.data_page_offset + column.total_compressed_size // 2
        flip(file, 8 * (middle if damage == "row id column" else records[1].bytes - 10))
    with pytest.raises(IntegrityError, match=f"label shard 1: .*{re.escape(records[1].file)}"):
        log.seal([0, 1, 2, 3], manifest_of(shards))
