"""The label log: the first commit wins, nothing half done is seen, nothing damaged is read, the books balance."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.errors import DataError, EnvironmentFault, IntegrityError, LockedError, ResumableError
from orchestrator.store import label_log
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.lock import exclusive
from orchestrator.store.records import ShardRecord, TokenManifest
from orchestrator.store.shards import TokenShard

IDENTITY: dict[str, Any] = {
    "teacher": {"content": "a" * 32, "dtype": "bf16"},
    "tokens": "b" * 32,
    "labels": {"kind": "sampled", "samples": 50, "temperatures": [1.0, 2.0], "method": "systematic"},
}
ERRNOS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE]

Labels = dict[str, list[bytes]]


def tokens_of(shard: int, rows: int = 4, seq: int = 8) -> TokenShard:
    rng = np.random.default_rng(shard)
    row_ids = [f"shard {shard:04d} r{row:03d}".encode() for row in range(rows)]
    return TokenShard([row_id.ljust(16) for row_id in row_ids], rng.integers(0, 4096, (rows, seq + 1), dtype=np.int32))


def labels_of(tokens: TokenShard, salt: int = 0) -> Labels:
    """Columns like those of sampled labels: 15 ids with counts a position, of two and one bytes."""
    rng = np.random.default_rng(salt)
    rows, positions = len(tokens.row_ids), tokens.ids.shape[1] - 1
    ids = np.sort(rng.zipf(1.3, (rows, positions, 15)).clip(max=4095), axis=2).astype("<u2")
    counts = rng.integers(1, 12, ids.shape, dtype=np.uint8)
    return {
        "n@1": [bytes([15]) * positions for _ in range(rows)],
        "ids@1": [row.tobytes() for row in ids],
        "counts@1": [row.tobytes() for row in counts],
    }


def manifest_of(shards: list[TokenShard]) -> TokenManifest:
    records = tuple(
        ShardRecord(sha256=f"{i:064d}", bytes=1, file=f"{i}.parquet", rows=len(t.row_ids)) for i, t in enumerate(shards)
    )
    return TokenManifest(
        fingerprint="t",
        seq_len=8,
        vocab_size=4096,
        tokenizer_sha256="",
        train=records,
        heldout=(),
        documents=1,
        heldout_documents=1,
        skipped_documents=0,
        dropped_tokens=0,
    )


def temporary_files(store: LocalStore) -> list[Path]:
    return list(store.root.rglob(".tmp*"))


@pytest.fixture
def log(store: LocalStore) -> LabelLog:
    return LabelLog.open(store, IDENTITY)


# Commits.


def test_a_shard_is_there_once_it_is_committed(log: LabelLog) -> None:
    tokens = tokens_of(0)
    assert log.committed(0) is None
    record = log.commit(0, tokens, labels_of(tokens))
    assert log.committed(0) == record
    assert record.rows == 4
    assert log.read(0, record, tokens) == labels_of(tokens)
    assert log.verify() == [(0, record)]
    assert not temporary_files(log.store)


def test_the_first_commit_wins(log: LabelLog) -> None:
    tokens = tokens_of(3)
    first = log.commit(3, tokens, labels_of(tokens, salt=1))
    second = log.commit(3, tokens, labels_of(tokens, salt=2))
    assert second == first
    assert log.read(3, second, tokens) == labels_of(tokens, salt=1) != labels_of(tokens, salt=2)
    assert len(log.store.keys(f"{log.folder}/data")) == 2, "the loser's file stays, and nobody names it"
    assert log.commit(3, tokens, labels_of(tokens, salt=1)) == first, "a repeated commit is no error"


def test_of_many_writers_at_once_one_wins(log: LabelLog) -> None:
    tokens, results = tokens_of(0), {}
    barrier = threading.Barrier(8)

    def write(salt: int) -> None:
        labels = labels_of(tokens, salt)
        barrier.wait()
        results[salt] = log.commit(0, tokens, labels)

    threads = [threading.Thread(target=write, args=(salt,)) for salt in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert set(results.values()) == {log.committed(0)}
    assert log.read(0, results[0], tokens) in [labels_of(tokens, salt) for salt in range(8)]


def test_missing_keeps_the_order_asked_for(log: LabelLog) -> None:
    assert log.missing([5, 2, 9]) == [5, 2, 9]
    log.commit(2, tokens_of(2), labels_of(tokens_of(2)))
    log.commit(7, tokens_of(7), labels_of(tokens_of(7)))
    assert log.missing([9, 2, 5, 7]) == [9, 5]
    assert log.missing([2]) == []


# Followers.


class Watched(LabelLog):
    """A log that counts how often a follower looks."""

    looks = 0

    def committed(self, shard: int) -> ShardRecord | None:
        self.looks += 1
        return super().committed(shard)


def test_a_follower_looks_ever_less_often(log: LabelLog) -> None:
    watched, wait_s = Watched(log.store, log.key), 1.0
    tokens, began = tokens_of(0), time.monotonic()
    writer = threading.Timer(wait_s, lambda: log.commit(0, tokens, labels_of(tokens)))
    writer.start()
    record = watched.awaited(0, lambda: None)
    waited_s = time.monotonic() - began
    writer.join()
    assert waited_s >= wait_s and record == log.committed(0)
    assert 3 < watched.looks < wait_s / label_log.POLL_S[0] / 2, "less than half of what the shortest pause would make"
    assert watched.awaited(0, lambda: None) == record


def test_a_follower_gives_up_when_told_to(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_log, "CHECK_ABORT_S", 0.05)
    reasons = iter([None, None, "the teacher died"])
    with pytest.raises(ResumableError, match="training stopped waiting for label shard 4: the teacher died") as caught:
        log.awaited(4, lambda: next(reasons))
    assert caught.value.exit_code == 6
    assert next(reasons, "all asked") == "all asked"


@pytest.mark.parametrize("rows", [3, 5])
def test_a_column_of_other_length_is_refused(log: LabelLog, rows: int) -> None:
    tokens, labels = tokens_of(1), labels_of(tokens_of(1, rows=5))
    with pytest.raises(DataError, match=rf"shard 1: {rows} rows of counts@1 for 4 rows") as caught:
        log.commit(1, tokens, labels_of(tokens) | {"counts@1": labels["counts@1"][:rows]})
    assert caught.value.exit_code == 3
    assert log.committed(1) is None


# Identity.


def changed(identity: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`identity` with one leaf after another made different."""
    for section, name in [
        ("teacher", "content"),
        ("teacher", "dtype"),
        (None, "tokens"),
        *(("labels", k) for k in IDENTITY["labels"]),
    ]:
        other = copy.deepcopy(identity)
        place = other if section is None else other[section]
        value = place[name]
        place[name] = [*value, 3.0] if isinstance(value, list) else value + 1 if isinstance(value, int) else value + "x"
        yield f"{section}.{name}", other


def test_every_field_of_the_identity_changes_the_key(log: LabelLog) -> None:
    keys = {name: LabelLog.open(log.store, other).key for name, other in changed(IDENTITY)}
    assert len({log.key, *keys.values()}) == 1 + 7
    reordered = {name: IDENTITY[name] for name in reversed(IDENTITY)}
    assert LabelLog.open(log.store, reordered).key == log.key, "the order of the fields is not part of the identity"


def test_a_new_identity_never_meets_old_labels(log: LabelLog) -> None:
    log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
    for _, other in changed(IDENTITY):
        assert LabelLog.open(log.store, other).missing([0]) == [0]
    assert LabelLog.open(log.store, IDENTITY).missing([0]) == []


def test_a_schema_version_is_not_read_by_another(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
    assert log.identity() == {"schema_version": 2, **IDENTITY}
    monkeypatch.setattr(label_log, "LABEL_SCHEMA_VERSION", 3)
    assert LabelLog.open(log.store, IDENTITY).key != log.key
    with pytest.raises(IntegrityError, match="not a label log of schema version 3"):
        log.verify()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": "1"}', None])
def test_a_folder_without_an_intact_key_is_no_log(log: LabelLog, content: bytes | None) -> None:
    file = log.store.path(f"{log.folder}/key.json")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(IntegrityError, match=re.escape(str(log.store.path(log.folder)))):
        log.verify()


# Damage.


@pytest.mark.parametrize("change", ["one id", "one row id", "a row less", "rows swapped"])
def test_labels_of_other_tokens_are_refused(log: LabelLog, change: str) -> None:
    tokens = tokens_of(6)
    record = log.commit(6, tokens, labels_of(tokens))
    row_ids, ids = list(tokens.row_ids), tokens.ids.copy()
    if change == "one id":
        ids[2, -1] ^= 1
    elif change == "one row id":
        row_ids[3] = b"x" * 16
    elif change == "a row less":
        row_ids, ids = row_ids[:-1], ids[:-1]
    else:
        row_ids[:2], ids[:2] = row_ids[1::-1], ids[1::-1].copy()
    with pytest.raises(IntegrityError, match="label shard 6: made from other tokens than token shard 6 holds"):
        log.read(6, record, TokenShard(row_ids, ids))


def test_a_thousand_flipped_bits_are_all_found(log: LabelLog, seed: int) -> None:
    rng = random.Random(seed)
    tokens = {shard: tokens_of(shard, rows=rows, seq=256) for shard, rows in ((0, 64), (1, 64), (11, 40))}
    records = {shard: log.commit(shard, part, labels_of(part, shard)) for shard, part in tokens.items()}
    assert all(record.bytes > 100_000 for record in records.values()), "shards of realistic size"
    hit: set[int] = set()
    for _ in range(1000):
        shard = rng.choice(list(tokens))
        bit = rng.randrange(records[shard].bytes * 8)
        with flipped(log.store.path(f"{log.folder}/data/{records[shard].file}"), bit):
            for reader in (lambda s=shard: log.read(s, records[s], tokens[s]), log.verify):
                with pytest.raises(IntegrityError, match=rf"^label shard {shard}: sha256 mismatch") as caught:
                    reader()
                assert caught.value.exit_code == 5
        hit.add(shard)
    assert hit == set(tokens)
    assert [shard for shard, _ in log.verify()] == [0, 1, 11], "unflipped, all is well"
    for shard, part in tokens.items():
        assert log.read(shard, records[shard], part) == labels_of(part, shard)


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        byte = os.pread(opened.fileno(), 1, bit // 8)[0]
        os.pwrite(opened.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """`file` with one bit the other way round, while it is entered."""
    flip(file, bit)
    yield
    flip(file, bit)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "gone", "longer"])
def test_a_damaged_file_is_found(log: LabelLog, damage: str) -> None:
    tokens = tokens_of(4)
    record = log.commit(4, tokens, labels_of(tokens))
    file = log.store.path(f"{log.folder}/data/{record.file}")
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, {"truncated": record.bytes // 2, "emptied": 0, "longer": record.bytes + 1}[damage])
    for reader in (lambda: log.read(4, record, tokens), log.verify):
        with pytest.raises(IntegrityError, match="label shard 4: "):
            reader()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff", b'{"file": "x"}'])
def test_a_damaged_commit_record_is_found(log: LabelLog, content: bytes) -> None:
    log.commit(2, tokens_of(2), labels_of(tokens_of(2)))
    file = log.store.path(f"{log.folder}/commits/000002.json")
    file.write_bytes(content)
    for reader in (lambda: log.committed(2), log.verify, lambda: log.seal([2], manifest_of([tokens_of(i) for i in range(3)]))):
        with pytest.raises(IntegrityError, match=r"commits/000002\.json: not a valid record"):
            reader()


@pytest.mark.parametrize(("name", "value"), [("rows", 5), ("sha256", "0" * 64), ("file", "other.parquet")])
def test_a_commit_record_that_tells_otherwise_is_found(log: LabelLog, name: str, value: object) -> None:
    record = log.commit(2, tokens_of(2), labels_of(tokens_of(2)))
    log.store.replace(f"{log.folder}/commits/000002.json", record.model_copy(update={name: value}).model_dump_json().encode())
    with pytest.raises(IntegrityError, match=r"^label shard 2: "):
        log.verify()


def test_verify_as_a_command(log: LabelLog) -> None:
    records = [log.commit(shard, tokens_of(shard), labels_of(tokens_of(shard))) for shard in range(3)]
    command = [sys.executable, "-m", "orchestrator.cli", "labels", "verify", str(log.store.path(log.folder))]
    intact = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (intact.returncode, intact.stdout) == (0, "3 shards, 12 rows: intact\n"), intact.stderr
    with flipped(log.store.path(f"{log.folder}/data/{records[1].file}"), bit=1000):
        damaged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert damaged.returncode == 5
    assert damaged.stderr == "distill: label shard 1: sha256 mismatch, the file has changed since it was written\n"


# The books.


@pytest.fixture
def shards() -> list[TokenShard]:
    return [tokens_of(shard, rows=3 + shard) for shard in range(4)]


def commit_all(log: LabelLog, shards: list[TokenShard]) -> list[ShardRecord]:
    return [log.commit(shard, tokens, labels_of(tokens)) for shard, tokens in enumerate(shards)]


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


# Half-written files and failing disks.


def test_temporary_files_are_invisible(log: LabelLog) -> None:
    record = log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
    for folder in ("data", "commits"):
        log.store.path(f"{log.folder}/{folder}/.tmp-0123456789ab").write_bytes(b'{"sha256":')
    assert log.missing([0, 1]) == [1]
    assert log.all_committed() == log.verify() == [(0, record)]


KILLED_WRITER = """
import itertools, os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_label_log import IDENTITY, LabelLog, LocalStore, labels_of, tokens_of
log = LabelLog.open(LocalStore(sys.argv[2]), IDENTITY)
name, nth, calls = sys.argv[3], int(sys.argv[4]), itertools.count(1)
real = getattr(os, name)
def dying(*args, **kwargs):
    if next(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, name, dying)
log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
"""


@pytest.mark.parametrize(("call", "nth"), [("fsync", 1), ("link", 1), ("fsync", 2), ("fsync", 3), ("link", 2), ("fsync", 4)])
def test_a_writer_killed_anywhere_leaves_all_or_nothing(log: LabelLog, call: str, nth: int) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(Path(__file__).parent), str(log.store.root), call, str(nth)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL, "the fault has fired"
    tokens = tokens_of(0)
    assert log.missing([0]) == ([] if (call, nth) == ("fsync", 4) else [0]), "the second link is the commit"
    record = log.commit(0, tokens, labels_of(tokens, salt=0))
    assert log.read(0, record, tokens) == labels_of(tokens)
    assert log.verify() == [(0, record)]


class Fault:
    """The `nth` call of one system call on the way of a commit fails with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: str, nth: int, code: int) -> None:
        self.fired = False
        self._nth, self._code, self._calls = nth, code, itertools.count(1)
        if site in ("link", "fsync"):
            monkeypatch.setattr(os, site, self._failing(getattr(os, site)))
        elif site == "rename":
            monkeypatch.setattr(Path, "replace", self._failing(Path.replace))
        else:
            monkeypatch.setattr(Path, "open", self._opening(site, Path.open))

    def _fail(self) -> None:
        self.fired = True
        raise OSError(self._code, os.strerror(self._code))

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._fail() if next(self._calls) == self._nth else real(*args, **kwargs)

        return call

    def _opening(self, site: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_(path: Path, *args: Any, **kwargs: Any) -> Any:
            if not path.name.startswith(".tmp") or next(self._calls) != self._nth:
                return real(path, *args, **kwargs)
            if site == "open":
                self._fail()
            file = real(path, "xb", buffering=0)
            return HalfWritten(file, self._fail)

        return open_


class HalfWritten:
    """A file that takes half of what is written and then fails."""

    def __init__(self, file: Any, fail: Callable[[], None]) -> None:
        self._file, self._fail = file, fail

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._fail()


SITES = [("open", 1), ("write", 1), ("fsync", 1), ("link", 1), ("fsync", 2)]
SITES += [("open", 2), ("write", 2), ("fsync", 3), ("link", 2), ("fsync", 4)]
"""Every call of a commit, in order: the first five put the data file, the others the commit record."""


@pytest.mark.parametrize("code", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize(("site", "nth"), SITES)
def test_a_failing_disk_leaves_all_or_nothing(log: LabelLog, site: str, nth: int, code: int) -> None:
    tokens = tokens_of(0)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, site, nth, code)
        with pytest.raises(EnvironmentFault) as caught:
            log.commit(0, tokens, labels_of(tokens))
    assert fault.fired
    assert caught.value.exit_code == 4
    first_half = SITES.index((site, nth)) < 5
    path = log.store.path(f"{log.folder}/{'data/000000-' if first_half else 'commits/000000.json'}")
    assert str(path) in str(caught.value)
    assert ("disk full" if code in (errno.ENOSPC, errno.EDQUOT) else os.strerror(code)) in str(caught.value)
    assert temporary_files(log.store) == []
    if (site, nth) == ("fsync", 4):  # the record is linked and whole; only that it would survive a power cut is unsure
        assert log.verify() == [(0, log.committed(0))]
    else:
        assert log.committed(0) is None
        assert log.missing([0]) == [0]
    record = log.commit(0, tokens, labels_of(tokens))
    assert log.read(0, record, tokens) == labels_of(tokens)
    assert temporary_files(log.store) == []


@pytest.mark.parametrize("code", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("site", ["open", "write", "fsync", "rename"])
def test_a_failing_disk_keeps_the_version_before(store: LocalStore, site: str, code: int) -> None:
    store.replace("run.json", b"old")
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, site, 1, code)
        with pytest.raises(EnvironmentFault, match=re.escape(str(store.path("run.json")))):
            store.replace("run.json", b"new")
    assert fault.fired
    assert store.read("run.json") == b"old"
    assert temporary_files(store) == []
    store.replace("run.json", b"new")
    assert store.read("run.json") == b"new"


def test_a_failing_read_names_the_file(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(0)
    record = log.commit(0, tokens, labels_of(tokens))

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(EnvironmentFault, match=re.escape(record.file)):
        log.read(0, record, tokens)


# The lock.

HOLDER = """
import sys, time
from pathlib import Path
from orchestrator.store.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    who = re.escape(f"{tmp_path / 'run'} is locked by {socket.gethostname()}:{holder.pid} since 20")
    for _ in range(2):
        with pytest.raises(LockedError, match=who) as caught, exclusive(tmp_path / "run" / "lock"):
            raise AssertionError("entered")
        assert caught.value.exit_code == 7
    assert holder.poll() is None
    with exclusive(tmp_path / "another" / "lock"):
        pass


def test_a_killed_holder_frees_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with (
        exclusive(tmp_path / "run" / "lock"),
        pytest.raises(LockedError, match=f":{os.getpid()} since"),
        exclusive(tmp_path / "run" / "lock"),
    ):
        raise AssertionError("entered")
    with exclusive(tmp_path / "run" / "lock"):
        pass


def test_a_lock_that_cannot_be_made_is_a_fault_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=re.escape(str(tmp_path / "file"))), exclusive(tmp_path / "file" / "lock"):
        raise AssertionError("entered")
