"""The batch algebra: global batch = data-parallel ranks x accumulation x micro-batch, in rows."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec.train import Train


@dataclass(frozen=True)
class Batch:
    """Rows per optimizer step, split over data-parallel ranks and forward passes."""

    global_rows: int
    ranks: int
    micro_rows: int
    accumulation: int

    @classmethod
    def of(cls, train: Train) -> Batch:
        rows = train.global_batch // train.data_parallel
        micro = min(train.micro_batch, rows)
        return cls(train.global_batch, train.data_parallel, micro, rows // micro)
