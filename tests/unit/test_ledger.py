"""The books of the label log: a demand is sealed when every row of it is there, once."""

from __future__ import annotations

import os

import pyarrow as pa
import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store import seals, shard_pages
from orchestrator.store.label_log import LabelLog
from orchestrator.store.label_repair import examine, give_up
from orchestrator.store.row_groups import put_shard
from orchestrator.store.seals import Committed
from orchestrator.store.shards import TokenShard
from tests.label_logs import commit_all, flip, labels_of, manifest_of, tokens_of


@pytest.fixture
def shards() -> list[TokenShard]:
    return [tokens_of(shard, rows=3 + shard) for shard in range(4)]


def test_a_complete_demand_is_sealed(log: LabelLog, shards: list[TokenShard]) -> None:
    records, manifest = commit_all(log, shards), manifest_of(log.store, shards)
    seal, ledger = log.seal([3, 1, 0], manifest)
    assert (ledger.planned, ledger.committed, ledger.quarantined, ledger.duplicates) == (13, 13, 0, 0)
    assert (seal.key, seal.shards, seal.rows) == (log.key, 3, 13)
    assert seal.bytes == sum(log.store.path(f"{log.folder}/data/{records[s].file}").stat().st_size for s in (3, 1, 0))
    assert log.seal([3, 1, 0], manifest) == log.seal([0, 1, 3], manifest) == (seal, ledger)
    assert log.seal([0, 1, 2, 3], manifest)[0].content != seal.content
    assert len(log.store.keys(f"{log.folder}/seals")) == 2


def test_a_missing_shard_does_not_balance(log: LabelLog, shards: list[TokenShard]) -> None:
    commit_all(log, shards[:3])
    with pytest.raises(IntegrityError, match="planned 18, committed 12, quarantined 0, duplicates 0") as caught:
        log.seal([0, 1, 2, 3], manifest_of(log.store, shards))
    assert caught.value.exit_code == 5
    assert log.store.keys(f"{log.folder}/seals") == []


def craft(log: LabelLog, shard: int, row_ids: list[bytes]) -> None:
    """Commit a valid file with other row ids in the place of a committed shard."""
    table = pa.table({"row_id": pa.array(row_ids, pa.binary(16))})
    record = put_shard(log.store, f"{log.folder}/data", shard, [table])
    log.store.replace(log.commit_key(shard), record.model_dump_json().encode())


def test_a_doubled_row_does_not_balance(log: LabelLog, shards: list[TokenShard]) -> None:
    commit_all(log, shards)
    craft(log, 2, [shards[2].row_ids[1], *shards[2].row_ids[1:]])
    with pytest.raises(IntegrityError, match="planned 18, committed 17, quarantined 0, duplicates 1"):
        log.seal([0, 1, 2, 3], manifest_of(log.store, shards))
    assert log.seal([0, 1, 3], manifest_of(log.store, shards))[1].balanced, "the double is in shard 2"


def test_a_row_of_another_shard_does_not_balance(log: LabelLog, shards: list[TokenShard]) -> None:
    """Also where the two shards are never asked for together."""
    commit_all(log, shards)
    craft(log, 2, [shards[1].row_ids[0], *shards[2].row_ids[1:]])
    with pytest.raises(IntegrityError, match="planned 5, committed 4, quarantined 0, duplicates 1"):
        log.seal([2], manifest_of(log.store, shards))


@pytest.mark.parametrize("rows", [4, 6])
def test_a_lost_or_added_row_does_not_balance(log: LabelLog, shards: list[TokenShard], rows: int) -> None:
    commit_all(log, shards)
    craft(log, 2, [*shards[2].row_ids, b"added".ljust(16)][:rows])
    with pytest.raises(
        IntegrityError, match=f"planned 18, committed {13 + min(5, rows)}, quarantined 0, duplicates {rows // 6}"
    ):
        log.seal([0, 1, 2, 3], manifest_of(log.store, shards))


class Counted(LabelLog):
    """A log that counts which shards are looked at."""

    looked: list[int]

    def _looked_at(self, shard: int) -> Committed | None:
        self.looked.append(shard)
        return super()._looked_at(shard)


def test_a_shard_is_compared_once(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another demand reuses what was compared, a sealed one looks at nothing, and giving up a shard forgets it all."""
    for module in (seals, shard_pages):
        monkeypatch.setattr(module, "PAGE_SHARDS", 3)
    many = [tokens_of(shard, rows=1 + shard % 3) for shard in range(20)]
    records, manifest = commit_all(log, many[:12]), manifest_of(log.store, many)
    counted = Counted(log.store, log.key)
    counted.looked = []
    first, _ = counted.seal([7, 3, 11, 0], manifest)
    assert sorted(counted.looked) == [0, 3, 7, 11]
    assert counted.seal([0, 3, 7, 11], manifest) == (first, counted.seal([7, 3, 11, 0], manifest)[1])
    assert len(counted.looked) == 4
    more, ledger = counted.seal(range(12), manifest)
    assert sorted(counted.looked) == list(range(12)), "each once"
    assert (more.rows, more.bytes) == (sum(r.rows for r in records), sum(r.bytes for r in records)) and ledger.balanced
    assert LabelLog(log.store, log.key).seal(range(12), manifest) == (more, ledger)
    log.store.path(f"{log.folder}/data/{records[4].file}").unlink()
    assert give_up(log, examine(log)[1]) == [4]
    with pytest.raises(IntegrityError, match="does not balance"):
        counted.seal(range(12), manifest)
    log.commit(4, many[4], labels_of(many[4], salt=1))
    counted.looked = []
    assert counted.seal(range(12), manifest)[0].content != more.content and 4 in counted.looked


@pytest.mark.parametrize("damage", ["truncated", "gone", "footer"])
def test_a_damaged_file_is_not_sealed(log: LabelLog, shards: list[TokenShard], damage: str) -> None:
    records = commit_all(log, shards)
    file = log.store.path(f"{log.folder}/data/{records[1].file}")
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, records[1].bytes // 2)
    else:
        flip(file, 8 * (records[1].bytes - records[1].footer_bytes // 2))
    with pytest.raises(IntegrityError, match=r"label shard 1: (the file .* is gone|sha256 mismatch)"):
        log.seal([0, 1, 2, 3], manifest_of(log.store, shards))
