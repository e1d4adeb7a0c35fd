"""Row groups: whoever needs a few rows reads these alone, and still knows that every byte is as it was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store import shard_pages
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.row_groups import ShardFile
from orchestrator.store.shard_pages import ShardPages, ShardRecord, paged
from orchestrator.store.shards import TokenShard, put_tokens, read_rows, read_tokens, token_file
from tests.label_logs import flip, labels_of, tokens_of

FOLDER, ROWS, GROUP = "data/x/train", 22, 4
GROUPS = 6


class Metered(LocalStore):
    """A storage that counts the bytes that are read."""

    read_bytes = 0

    def read(self, key: str) -> bytes:
        return self._counted(super().read(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._counted(super().read_range(key, start, length))

    def _counted(self, data: bytes) -> bytes:
        self.read_bytes += len(data)
        return data


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Metered, TokenShard, ShardRecord]:
    store, tokens = Metered(tmp_path), tokens_of(3, rows=ROWS, seq=2000)
    return store, tokens, put_tokens(store, FOLDER, 0, tokens, GROUP)


def test_a_group_is_read_by_itself(shard: tuple[Metered, TokenShard, ShardRecord]) -> None:
    store, tokens, record = shard
    file = token_file(store, FOLDER, record)
    assert len(file.footer.groups) == GROUPS and store.read_bytes == record.footer_bytes
    for number in range(GROUPS):
        before, rows = store.read_bytes, tokens.rows(slice(number * GROUP, (number + 1) * GROUP))
        assert same(TokenShard.from_table(file.group(number)), rows)
        assert store.read_bytes - before == file.footer.groups[number].bytes < record.bytes / (GROUPS - 1)
    assert same(read_tokens(store, FOLDER, record), tokens)
    assert same(read_rows(store, FOLDER, record, range(3, 9), GROUP), tokens.rows(slice(3, 9)))


def same(found: TokenShard, due: TokenShard) -> bool:
    return found.row_ids == due.row_ids and (found.ids == due.ids).all()


def test_it_is_one_parquet_file_for_everybody_else(shard: tuple[Metered, TokenShard, ShardRecord]) -> None:
    store, tokens, record = shard
    table = pq.read_table(store.path(f"{FOLDER}/{record.file}"), page_checksum_verification=True)
    assert same(TokenShard.from_table(table), tokens)


def test_groups_and_footer_are_the_whole_file(shard: tuple[Metered, TokenShard, ShardRecord]) -> None:
    """So nothing can change in it that no hash covers, but for the four letters that it begins with."""
    store, _, record = shard
    groups = token_file(store, FOLDER, record).footer.groups
    ends = [4, *(group.start + group.bytes for group in groups)]
    assert [group.start for group in groups] == ends[:-1]
    assert ends[-1] + record.footer_bytes == record.bytes == store.path(f"{FOLDER}/{record.file}").stat().st_size


@pytest.mark.parametrize("number", range(GROUPS))
def test_a_flipped_bit_is_found_by_those_who_read_its_group(
    shard: tuple[Metered, TokenShard, ShardRecord], number: int
) -> None:
    store, _, record = shard
    group = token_file(store, FOLDER, record).footer.groups[number]
    flip(store.path(f"{FOLDER}/{record.file}"), 8 * (group.start + group.bytes // 2) + 3)
    file = token_file(store, FOLDER, record)
    for other in range(GROUPS):
        if other != number:
            file.group(other)
    with pytest.raises(IntegrityError, match=f"token shard {FOLDER}/{record.file}: sha256 mismatch"):
        file.group(number)
    with pytest.raises(IntegrityError, match=r"remove .*/data/x and run the job again, which makes the toke"):
        read_rows(store, FOLDER, record, range(number * GROUP, number * GROUP + 1), GROUP)
    with pytest.raises(IntegrityError, match="sha256 mismatch"):
        file.check()


@pytest.mark.parametrize("damage", ["footer", "truncated", "gone", "exchanged"])
def test_a_footer_that_is_not_the_records_is_not_believed(shard: tuple[Metered, TokenShard, ShardRecord], damage: str) -> None:
    store, _, record = shard
    path = store.path(f"{FOLDER}/{record.file}")
    if damage == "footer":
        flip(path, 8 * (record.bytes - record.footer_bytes + 5))
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        other = put_tokens(store, FOLDER, 1, tokens_of(4, rows=ROWS, seq=2000), GROUP)
        path.write_bytes(store.read(f"{FOLDER}/{other.file}"))
    with pytest.raises(IntegrityError, match="gone" if damage == "gone" else "sha256 mismatch"):
        token_file(store, FOLDER, record).group(0)


def test_labels_come_by_group_and_are_checked_against_its_tokens(log: LabelLog) -> None:
    tokens = tokens_of(1, rows=ROWS)
    labels = labels_of(tokens, group_rows=GROUP)
    record = log.commit(1, tokens, labels)
    assert log.read(1, record, tokens) == labels
    file = log.file(1, record)
    for number, due in enumerate(labels):
        rows = tokens.rows(slice(number * GROUP, (number + 1) * GROUP))
        assert log.read_group(1, file, number, rows) == due
        with pytest.raises(IntegrityError, match="label shard 1: made from other tokens"):
            log.read_group(1, file, (number + 1) % GROUPS, rows)
    other = dataclasses.replace(tokens, ids=tokens.ids + 1)
    with pytest.raises(IntegrityError, match="label shard 1: made from other tokens"):
        log.read_group(1, file, 0, other.rows(slice(GROUP)))


# Pages of records.


def records_of(count: int) -> list[ShardRecord]:
    return [
        ShardRecord(
            file=f"{i}.parquet",
            sha256=f"{i:064x}",
            bytes=i + 9,
            rows=1 + i % 7,
            footer_bytes=5,
            footer_sha256=f"{i:064d}",
            rows_sha256="",
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 10])
def test_pages_hold_every_record(store: LocalStore, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shard_pages, "PAGE_SHARDS", 4)
    records = records_of(count)
    pages = paged(store, FOLDER, records)
    assert len(pages.pages) == -(-count // 4) and len(pages) == count
    assert pages.rows.tolist() == [record.rows for record in records]
    assert list(pages.records(store)) == records == [pages.record(store, shard) for shard in range(count)]
    assert list(pages.records(store, range(0, count, 3))) == records[::3]
    assert ShardPages.model_validate_json(pages.model_dump_json()) == pages
    assert ShardPages.of_rows([record.rows for record in records]).rows.tolist() == pages.rows.tolist()


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_page_is_named(store: LocalStore, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(shard_pages, "PAGE_SHARDS", 4)
    pages = paged(store, FOLDER, records_of(10))
    path = store.path(f"{FOLDER}/pages/000001.json")
    if damage == "gone":
        path.unlink()
    else:
        flip(path, 77)
    assert pages.record(store, 3).bytes == 12 and pages.record(store, 8).bytes == 17, "others are fine"
    with pytest.raises(IntegrityError, match=r"pages/000001\.json.*remove .*/data/x and run the job again"):
        pages.record(store, 4)


def test_a_large_corpus_is_opened_in_little_memory() -> None:
    """Half a million shards, as many as 10T tokens make; the most uneven numbers of rows still take less than a megabyte."""
    import random
    import tracemalloc

    even = ShardPages.of_rows([5120] * 500_000)
    uneven = ShardPages.of_rows([random.Random(0).randrange(16, 6000) // 16 * 16 for _ in range(500_000)])
    assert len(even.packed_rows) < 10_000 and len(uneven.packed_rows) < 1_000_000
    tracemalloc.start()
    assert even.rows.sum() == 5120 * 500_000
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_shard_file_is_asked_for_its_footer_once(shard: tuple[Metered, TokenShard, ShardRecord]) -> None:
    store, _, record = shard
    file = ShardFile(store, FOLDER, record, "here")
    file.group(0)
    before = store.read_bytes
    file.group(1)
    assert store.read_bytes - before == file.footer.groups[1].bytes
