"""What a label log costs on storage, column by column, beside what its contents must cost."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from orchestrator.labels.layout import Columns, tempered
from orchestrator.labels.setcode import COLUMNS, ID_COLUMNS, decode_sets, entropy_bound
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import ShardRecord
from orchestrator.store.shards import binary_column, get_shard

SHARDS_READ = 16
"""Shards that are looked into; a log has many alike."""


@dataclass(frozen=True)
class Costs:
    """Bytes per token."""

    columns: dict[str, float]
    """Compressed, by column of the shards' files."""
    bounds: dict[str, float]
    """Order-0 entropy of sampled ids and counts, by columns together; see `setcode.entropy_bound`."""
    unique_ids: dict[str, float]
    """Mean unique ids per position, by temperature, where ids were sampled."""


def label_costs(log: LabelLog) -> Costs:
    """Costs of the first committed shards of `log`; raises `IntegrityError` for a damaged one."""
    identity = log.identity()
    seq_len, vocab_size = identity["shape"]["seq_len"], identity["shape"]["vocab_size"]
    sizes: Counter[str] = Counter()
    bits: Counter[str] = Counter()
    unique: Counter[str] = Counter()
    tokens = 0
    for shard, record in log.all_committed()[:SHARDS_READ]:
        count = record.rows * seq_len
        tokens += count
        columns = _columns(log, shard, record)
        sizes.update(_compressed(log, record))
        if identity["labels"]["kind"] == "sampled":
            for t in identity["labels"]["temperatures"]:
                bound, mean = _bound(columns, t, identity["labels"]["samples"], vocab_size, seq_len)
                bits.update({name: value * count for name, value in bound.items()})
                unique[f"{t:g}"] += mean * count
    per_token = [{name: value / tokens for name, value in counted.items()} for counted in (sizes, bits, unique)]
    return Costs(*per_token)


def _compressed(log: LabelLog, record: ShardRecord) -> Mapping[str, int]:
    with log.store.open(f"{log.folder}/data/{record.file}") as file:
        group = pq.ParquetFile(file).metadata.row_group(0)
    columns: list[Any] = [group.column(i) for i in range(group.num_columns)]
    return {column.path_in_schema: column.total_compressed_size for column in columns}


def _columns(log: LabelLog, shard: int, record: ShardRecord) -> Columns:
    table = get_shard(log.store, f"{log.folder}/data", record, f"label shard {shard}")
    return {name: binary_column(table, name) for name in table.column_names}


def _bound(columns: Columns, t: float, samples: int, vocab_size: int, seq_len: int) -> tuple[dict[str, float], float]:
    packed = {name: columns[tempered(name, t)] for name in COLUMNS}
    unique, ids, counts = decode_sets(packed, samples, vocab_size, seq_len)
    bound = entropy_bound(unique, ids, counts)
    together = " + ".join(tempered(name, t) for name in ID_COLUMNS)
    return {together: bound["unique"] + bound["ids"], tempered("counts", t): bound["counts"]}, float(np.mean(unique))
