"""Rows for the teacher pool: one after another, each a block of its own, whatever their number.

A block is what Ray Data gives to an actor, and does again when that dies, so each row has its own. A block that exists costs
the driver kilobytes and a millisecond; of many rows only those exist that are about to be handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset, Datasource, ReadTask
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data.block import Block, BlockMetadata

MOST_BLOCKS = 2_000
"""Rows that are all made into blocks beforehand, which starts no process."""

Row = dict[str, Any]


def handed_out(rows: Sequence[Row]) -> Dataset:
    """`rows` in their order, each a block."""
    if len(rows) <= MOST_BLOCKS:
        return ray.data.from_items(list(rows), override_num_blocks=len(rows))
    context = ray.data.DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, 1  # so that no two rows share a block
    try:
        data = ray.data.read_datasource(_Rows(rows), override_num_blocks=1, num_cpus=0)
    finally:
        context.target_max_block_size = before
    add_policy(data, FewAhead)
    return data


def add_policy(data: Dataset, policy: Callable[..., BackpressurePolicy]) -> None:
    """Have Ray Data heed one more backpressure policy when it runs `data`, or what is made of it from now on."""
    key = ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
    data.context.set_config(key, [*data.context.get_config(key, ENABLED_BACKPRESSURE_POLICIES), policy])


class FewAhead(BackpressurePolicy):
    """Takes no more blocks from who makes them while `MOST_BLOCKS` wait for actors.

    Ray Data's own policies count bytes, and rows have next to none.
    """

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        waiting = sum(self._topology[later].total_enqueued_input_blocks() for later in op.output_dependencies)
        return 0 if waiting >= MOST_BLOCKS else None


class _Rows(Datasource):
    """Makes blocks in one task, which Ray Data lets go on only as they are used."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__()
        self._table = pa.Table.from_pylist(list(rows))

    def estimate_inmemory_data_size(self) -> int | None:
        return self._table.nbytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any | None = None
    ) -> list[ReadTask]:
        table = self._table

        def blocks() -> Iterator[Block]:
            return (table.slice(row, 1) for row in range(table.num_rows))

        metadata = BlockMetadata(num_rows=table.num_rows, size_bytes=table.nbytes, input_files=None, exec_stats=None)
        return [ReadTask(blocks, metadata)]
