"""Storage cost of a label log, column by column, beside the lower bound that its contents imply."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.labels.layout import Columns, tempered
from orchestrator.labels.setcode import COLUMNS, ID_COLUMNS, decode_sets, entropy_bound
from orchestrator.store.label_log import LabelLog
from orchestrator.store.row_groups import ShardFile, binary_column

SHARDS_READ, GROUPS_READ = 16, 16
"""Shards that are looked into, and row groups of each; a log has many alike."""


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
    """Costs of the first row groups of the first committed shards of `log`; raises `IntegrityError` for a damaged one."""
    identity = log.identity()
    seq_len, vocab_size = identity["shape"]["seq_len"], identity["shape"]["vocab_size"]
    sizes: Counter[str] = Counter()
    bits: Counter[str] = Counter()
    unique: Counter[str] = Counter()
    tokens = 0
    for file, number in _groups(log):
        table = file.group(number)
        count = table.num_rows * seq_len
        tokens += count
        sizes.update(_compressed(file, number))
        if identity["labels"]["kind"] == "sampled":
            columns = {name: binary_column(table, name) for name in table.column_names}
            for t in identity["labels"]["temperatures"]:
                bound, mean = _bound(columns, t, identity["labels"]["samples"], vocab_size, seq_len)
                bits.update({name: value * count for name, value in bound.items()})
                unique[f"{t:g}"] += mean * count
    per_token = [{name: value / tokens for name, value in counted.items()} for counted in (sizes, bits, unique)]
    return Costs(*per_token)


def _groups(log: LabelLog) -> Iterator[tuple[ShardFile, int]]:
    for shard in log.shards()[:SHARDS_READ]:
        record = log.committed(shard)
        assert record is not None
        file = log.file(shard, record)
        yield from ((file, number) for number in range(min(GROUPS_READ, len(file.footer.groups))))


def _compressed(file: ShardFile, number: int) -> Mapping[str, int]:
    group = file.footer.metadata.row_group(number)
    columns: list[Any] = [group.column(i) for i in range(group.num_columns)]
    return {column.path_in_schema: column.total_compressed_size for column in columns}


def _bound(columns: Columns, t: float, samples: int, vocab_size: int, seq_len: int) -> tuple[dict[str, float], float]:
    packed = {name: columns[tempered(name, t)] for name in COLUMNS}
    unique, ids, counts = decode_sets(packed, samples, vocab_size, seq_len)
    bound = entropy_bound(unique, ids, counts)
    together = " + ".join(tempered(name, t) for name in ID_COLUMNS)
    return {together: bound["unique"] + bound["ids"], tempered("counts", t): bound["counts"]}, float(np.mean(unique))
