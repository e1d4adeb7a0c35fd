"""Nothing damaged is read from the label log, and nothing that belongs to other tokens."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.errors import IntegrityError
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.shards import TokenShard
from tests.label_logs import IDENTITY, flip, labels_of, manifest_of, tokens_of, verified


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
            for reader in (lambda s=shard: log.read(s, records[s], tokens[s]), lambda: verified(log)):
                with pytest.raises(IntegrityError, match=rf"^label shard {shard}: sha256 mismatch") as caught:
                    reader()
                assert caught.value.exit_code == 5
        hit.add(shard)
    assert hit == set(tokens)
    assert [shard for shard, _ in verified(log)] == [0, 1, 11], "unflipped, all is well"
    for shard, part in tokens.items():
        assert log.read(shard, records[shard], part) == labels_of(part, shard)


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
    for reader in (lambda: log.read(4, record, tokens), lambda: verified(log)):
        with pytest.raises(IntegrityError, match="label shard 4: "):
            reader()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff", b'{"file": "x"}'])
def test_a_damaged_commit_record_is_found(log: LabelLog, content: bytes) -> None:
    log.commit(2, tokens_of(2), labels_of(tokens_of(2)))
    file = log.store.path(f"{log.folder}/commits/000002.json")
    file.write_bytes(content)
    for reader in (
        lambda: log.committed(2),
        lambda: verified(log),
        lambda: log.seal([2], manifest_of(log.store, [tokens_of(i) for i in range(3)])),
    ):
        with pytest.raises(IntegrityError, match=r"commits/000002\.json: not a valid record"):
            reader()


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", 5), ("sha256", "0" * 64), ("file", "other.parquet"), ("rows_sha256", "0" * 64), ("footer_sha256", "0" * 64)],
)
def test_a_commit_record_that_tells_otherwise_is_found(log: LabelLog, name: str, value: object) -> None:
    record = log.commit(2, tokens_of(2), labels_of(tokens_of(2)))
    log.store.replace(f"{log.folder}/commits/000002.json", record.model_copy(update={name: value}).model_dump_json().encode())
    with pytest.raises(IntegrityError, match=r"^label shard 2: "):
        verified(log)


@pytest.mark.parametrize("root", ["labels", "heldout"])
def test_verify_as_a_command(store: LocalStore, root: str) -> None:
    log = LabelLog.open(store, IDENTITY, root)
    records = [log.commit(shard, tokens_of(shard), labels_of(tokens_of(shard))) for shard in range(3)]
    command = [sys.executable, "-m", "orchestrator.cli", "labels", "verify", str(log.store.path(log.folder))]
    intact = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (intact.returncode, intact.stdout) == (0, "3 shards, 12 rows: intact\n"), intact.stderr
    with flipped(log.store.path(f"{log.folder}/data/{records[1].file}"), bit=1000):
        damaged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert damaged.returncode == 5
    problem = "label shard 1: sha256 mismatch, the file has changed since it was written"
    assert damaged.stdout == f"{problem}\n2 shards, 8 rows: intact\n"
    (line,) = damaged.stderr.splitlines()
    assert line.startswith("distill: ") and "1 damaged" in line and f"distill labels repair {command[-1]}" in line
