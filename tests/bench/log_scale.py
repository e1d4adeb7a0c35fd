"""What the label log costs as it grows: commits, followers, listing and sealing at 1,000, 10,000 and 100,000 shards.

    make bench-log      prints one JSON line last and writes it to tests/bench/results/log_scale.json

The real log on the real file system, a log for each size, shards of 64 rows with 8 bytes of labels each, filled by processes
that do not wait for the disk. Then commits (which do), follow steps, polls and reads on all logs in turn, medians in CPU and
wall time; what is proportional to the demand (listing what is missing, sealing) is given per shard. Then 1,000 followers,
simulated in one process by what a worker does without its tensors, train through the largest log, and 1,000 threads wait
for a shard that is committed ten seconds later.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from keep import keep, machine
from memory import peak, reset_peak

from orchestrator.plan.order import TrainingOrder
from orchestrator.store import label_log
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ShardRecord, TokenManifest
from orchestrator.store.shards import TokenShard

SIZES = (1_000, 10_000, 100_000)
ROWS, SEQ = 64, 8
WRITERS, SHARDS_A_TASK = 2, 250
SAMPLES = 500
"""Operations of each sort that are timed at each size; as many commits lie beyond the demand that is then sealed."""
FOLLOWERS, ROWS_A_STEP = 1_000, 8
"""Data-parallel ranks, and rows that each takes of every global batch."""
WAIT_S = 10.0
PAUSES = {"every 20 ms": (0.02, 0.02), "backing off": label_log.POLL_S}
IDENTITY = {"bench": "log"}

Figures = dict[str, Any]


def tokens_of(shard: int) -> TokenShard:
    row_ids = [f"{shard:08d}{row:08d}".encode() for row in range(ROWS)]
    return TokenShard(row_ids, np.arange(ROWS * (SEQ + 1), dtype=np.int32).reshape(ROWS, -1) + shard)


def labels_of(shard: int) -> dict[str, list[bytes]]:
    return {"labels": [f"{shard:08d}".encode()] * ROWS}


def manifest_of(shards: int) -> TokenManifest:
    records = [ShardRecord(file=f"{i}.parquet", sha256=f"{i:064d}", bytes=1, rows=ROWS) for i in range(shards)]
    return TokenManifest.without_corpus(SEQ, 1 << 20, records)


def commit_range(root: Path, shards: range) -> None:
    log = LabelLog.open(LocalStore(root), IDENTITY)
    for shard in shards:
        log.commit(shard, tokens_of(shard), labels_of(shard))


def grow(root: Path, size: int) -> LabelLog:
    """A log of `size` shards, committed by `WRITERS` processes at once, which do not wait for the disk."""
    tasks = [range(i, min(size, i + SHARDS_A_TASK)) for i in range(0, size, SHARDS_A_TASK)]
    with ProcessPoolExecutor(WRITERS, get_context("spawn"), initializer=_unsynced) as writers:
        list(writers.map(commit_range, itertools.repeat(root), tasks))
    os.sync()
    return LabelLog.open(LocalStore(root), IDENTITY)


def _unsynced() -> None:
    os.fsync = lambda _: None


def each(logs: dict[int, LabelLog]) -> dict[str, dict[int, Figures]]:
    """What single operations cost on logs of 'size' shards: medians in microseconds. Leaves `SAMPLES` more shards in each."""
    orders = {size: TrainingOrder([ROWS] * size, 0, FOLLOWERS * ROWS_A_STEP) for size in logs}
    chosen = {size: random.Random(0).sample(range(size), SAMPLES) for size in logs}
    operations: dict[str, Callable[[int, int], Any]] = {
        "commit": lambda size, i: logs[size].commit(size + i, tokens_of(size + i), labels_of(size + i)),
        "follow": lambda size, i: logs[size].awaited(chosen[size][i], _never),
        "poll": lambda size, i: logs[size].committed(size + SAMPLES + i),
        "read": lambda size, i: read(logs[size], chosen[size][i]),
        "rows of a step": lambda size, i: orders[size].share(i % 8, i % FOLLOWERS, FOLLOWERS),
    }
    return {name: timed(operation, list(logs)) for name, operation in operations.items()}


def read(log: LabelLog, shard: int) -> None:
    record = log.committed(shard)
    assert record is not None
    log.read(shard, record, tokens_of(shard))


def timed(operation: Callable[[int, int], Any], sizes: list[int]) -> dict[int, Figures]:
    """Medians of `SAMPLES` calls for each size in turn, so that whatever else the machine does hits all sizes alike."""
    wall: dict[int, list[float]] = {size: [] for size in sizes}
    cpu: dict[int, list[float]] = {size: [] for size in sizes}
    for i in range(SAMPLES):
        for size in sizes:
            began, started = time.process_time(), time.perf_counter()
            operation(size, i)
            wall[size].append(time.perf_counter() - started)
            cpu[size].append(time.process_time() - began)
    return {
        size: {
            "cpu_us": round(statistics.median(cpu[size]) * 1e6, 1),
            "wall_us": round(statistics.median(wall[size]) * 1e6, 1),
        }
        for size in sizes
    }


def _never() -> None:
    """Nobody has given up."""


def missing(log: LabelLog, size: int) -> Figures:
    demand = range(size + 2 * SAMPLES)
    started = time.perf_counter()
    found = log.missing(demand)
    seconds = time.perf_counter() - started
    assert found == list(demand[-SAMPLES:])
    return {"s": round(seconds, 3), "us_a_shard": round(seconds / size * 1e6, 2)}


def seal(log: LabelLog, size: int) -> Figures:
    manifest = manifest_of(size)
    before = reset_peak()
    began, started = time.process_time(), time.perf_counter()
    sealed, ledger = log.seal(range(size), manifest)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - began
    assert (sealed.shards, ledger.committed, ledger.duplicates) == (size, size * ROWS, 0)
    return {
        "s": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "us_a_shard": round(seconds / size * 1e6, 1),
        "extra_mb": round((peak() - before) / 2**20, 1),
    }


def train_through(log: LabelLog, size: int) -> Figures:
    """`FOLLOWERS` followers take every step of an epoch; CPU time of a follower's step in each tenth of it."""
    order = TrainingOrder([ROWS] * size, 0, FOLLOWERS * ROWS_A_STEP)
    steps = size * ROWS // (FOLLOWERS * ROWS_A_STEP)
    tenths, began = [], time.process_time()
    for step in range(steps):
        for rank in range(FOLLOWERS):
            order.shard_count_until(step + 1)
            for shard in dict.fromkeys(s for s, _ in order.share(step, rank, FOLLOWERS)):
                log.awaited(shard, _never)
        if (step + 1) * 10 // steps > step * 10 // steps:
            tenths.append(time.process_time() - began)
            began = time.process_time()
    each = [round(cpu_s / (steps / 10 * FOLLOWERS) * 1e6, 1) for cpu_s in tenths]
    return {"followers": FOLLOWERS, "steps": steps, "cpu_us_by_tenth": each, "last_over_first": round(each[-1] / each[0], 2)}


class Watched(LabelLog):
    """A log that counts how often its followers look."""

    def __init__(self, store: LocalStore, key: str) -> None:
        super().__init__(store, key)
        self.looks = itertools.count()

    def committed(self, shard: int) -> ShardRecord | None:
        next(self.looks)
        return super().committed(shard)


def wait_together(log: LabelLog, shard: int, pauses: tuple[float, float]) -> Figures:
    """`FOLLOWERS` threads wait for `shard`, committed after `WAIT_S`: what they ask of the storage, and how late they are."""
    label_log.POLL_S = pauses
    watched, ends = Watched(log.store, log.key), []

    def follow() -> None:
        watched.awaited(shard, _never)
        ends.append(time.perf_counter())

    threads = [threading.Thread(target=follow) for _ in range(FOLLOWERS)]
    for thread in threads:
        thread.start()
    time.sleep(WAIT_S / 2)
    before, began, started = next(watched.looks), time.process_time(), time.perf_counter()
    time.sleep(WAIT_S / 2)
    looks, cpu_s, seconds = next(watched.looks) - before, time.process_time() - began, time.perf_counter() - started
    log.commit(shard, tokens_of(shard), labels_of(shard))
    committed = time.perf_counter()
    for thread in threads:
        thread.join()
    late = sorted(end - committed for end in ends)
    return {
        "looks_per_s": round(looks / seconds),
        "cores_busy": round(cpu_s / seconds, 2),
        "late_s_median": round(late[len(late) // 2], 3),
        "late_s_most": round(late[-1], 3),
    }


def growth(costs: dict[str, dict[int, Figures]]) -> dict[str, float]:
    """Costs at the largest size over those at the smallest."""
    grown = {}
    for name, by_size in costs.items():
        small, large = by_size[min(by_size)], by_size[max(by_size)]
        grown |= {f"{name}, {unit}": round(large[unit] / small[unit], 2) for unit in small if "us" in unit}
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the logs are made; the system's temporary folder if not given")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="log-", dir=args.folder) as folder:
        logs = {size: grow(Path(folder) / str(size), size) for size in args.sizes}
        costs = each(logs)
        costs["missing"] = {size: missing(log, size) for size, log in logs.items()}
        costs["seal"] = {size: seal(log, size) for size, log in logs.items()}
        print(json.dumps(costs), flush=True)
        most = max(logs)
        result = {
            "machine": machine(),
            "load": round(os.getloadavg()[0], 2),
            "costs": costs,
            "growth": growth(costs),
            "train_through": train_through(logs[most], most),
            "wait_together": {
                name: wait_together(logs[most], most + SAMPLES + i, pauses) for i, (name, pauses) in enumerate(PAUSES.items())
            },
        }
    keep("log_scale", result)


if __name__ == "__main__":
    main()
