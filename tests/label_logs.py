"""A label log of shards that are made up: cheap, of realistic columns, and the same in every process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import IntegrityError
from orchestrator.store.interface import Store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.label_repair import examine
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import ShardRecord, paged
from orchestrator.store.shards import TokenShard, put_tokens

IDENTITY: dict[str, Any] = {
    "teacher": {"content": "a" * 32, "dtype": "bf16"},
    "tokens": "b" * 32,
    "labels": {"kind": "sampled", "samples": 50, "temperatures": [1.0, 2.0], "method": "systematic"},
}

TOKENS = "data/made-up/train"
Labels = dict[str, list[bytes]]


def tokens_of(shard: int, rows: int = 4, seq: int = 8) -> TokenShard:
    rng = np.random.default_rng(shard)
    row_ids = [f"shard {shard:04d} r{row:03d}".encode() for row in range(rows)]
    return TokenShard([row_id.ljust(16) for row_id in row_ids], rng.integers(0, 4096, (rows, seq + 1), dtype=np.int32))


def grouped(labels: Labels, group_rows: int) -> list[Labels]:
    """`labels` of a whole shard as those of its row groups."""
    rows = len(next(iter(labels.values())))
    return [
        {name: values[start : start + group_rows] for name, values in labels.items()} for start in range(0, rows, group_rows)
    ]


def labels_of(tokens: TokenShard, salt: int = 0, group_rows: int = 16) -> list[Labels]:
    """Row groups with columns like those of sampled labels: 15 ids with counts a position, of two and one bytes."""
    rng = np.random.default_rng(salt)
    rows, positions = len(tokens.row_ids), tokens.ids.shape[1] - 1
    ids = np.sort(rng.zipf(1.3, (rows, positions, 15)).clip(max=4095), axis=2).astype("<u2")
    counts = rng.integers(1, 12, ids.shape, dtype=np.uint8)
    columns = {
        "n@1": [bytes([15]) * positions for _ in range(rows)],
        "ids@1": [row.tobytes() for row in ids],
        "counts@1": [row.tobytes() for row in counts],
    }
    return grouped(columns, group_rows)


def verified(log: LabelLog) -> list[tuple[int, ShardRecord]]:
    """All shards of a log that is intact; raises `IntegrityError` for the first loss."""
    intact, losses = examine(log)
    for loss in losses:
        raise IntegrityError(loss.problem)
    return list(intact.items())


def manifest_of(store: Store, shards: list[TokenShard], group_rows: int = 16) -> TokenManifest:
    """Store `shards` as the tokens that a log is about."""
    records = [put_tokens(store, TOKENS, shard, tokens, group_rows) for shard, tokens in enumerate(shards)]
    return TokenManifest.without_corpus(8, 4096, paged(store, TOKENS, records), group_rows=group_rows)


def temporary_files(store: LocalStore) -> list[Path]:
    return list(store.root.rglob(".tmp*"))


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        byte = os.pread(opened.fileno(), 1, bit // 8)[0]
        os.pwrite(opened.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)


def commit_all(log: LabelLog, shards: list[TokenShard]) -> list[ShardRecord]:
    return [log.commit(shard, tokens, labels_of(tokens)) for shard, tokens in enumerate(shards)]
