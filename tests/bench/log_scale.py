"""What tokens, labels and the order of training cost a process as they grow: at 1,000 to 500,000 shards.

    make bench-log      prints one JSON line last and writes it to tests/bench/results/log_scale.json

Real records on the real file system. 500,000 shards are what 10T tokens make. All commit records of a log name one label file
of `ROWS` rows, so that half a million of them fit a small disk; everything that is done per shard is done.

- `operations`: single ones on logs of all sizes in turn, medians of CPU and wall time.
- `processes`: what the driver, a teacher actor and a training worker do when they start on the largest corpus, each in a
  process of its own: seconds, and megabytes beyond what its imports take. Beside it the same as it was done before
  (`old_log.py`): the manifest as one JSON file with a record for each shard, read whole and carried whole, and every row id
  read at every sealing.
- `decoding`: rows decoded over rows used, of 1,000 ranks with 4 rows each, before and now.
- `train_through`, `wait_together`: 2,000 followers, simulated in one process by what a worker does without its tensors, train
  through the largest log; as many threads wait for a shard that is committed ten seconds later.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import old_log
from keep import keep, machine
from memory import peak, reset_peak

from orchestrator.plan.order import TrainingOrder
from orchestrator.store import label_log
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import PageWriter, ShardRecord
from orchestrator.store.shards import TokenShard, put_tokens

SIZES = (1_000, 10_000, 100_000, 500_000)
ROWS, GROUP, SEQ = 64, 16, 8
LARGE_ROWS = 5_120
"""Rows of 4,096 tokens in a shard of a very large corpus."""
SAMPLES = 300
"""Operations of each sort that are timed at each size; as many commits lie beyond the demand that is then sealed."""
FOLLOWERS, ROWS_A_STEP = 2_000, 4
"""Data-parallel ranks, and rows that each takes of every global batch."""
FOLLOWED_STEPS = 200
RANKS, WATCHED_RANKS, DECODED_STEPS = 1_000, 5, 3_000
WAIT_S = 10.0
PAUSES = {"every 20 ms": (0.02, 0.02), "backing off": label_log.POLL_S}
IDENTITY = {"bench": "log"}
FOLDER = "data/bench"

Figures = dict[str, Any]


def tokens_of(shard: int) -> TokenShard:
    row_ids = [f"{shard:08d}{row:08d}".encode() for row in range(ROWS)]
    return TokenShard(row_ids, np.arange(ROWS * (SEQ + 1), dtype=np.int32).reshape(ROWS, -1) + shard)


def labels_of(shard: int) -> list[dict[str, list[bytes]]]:
    return [{"labels": [f"{shard:08d}".encode()] * GROUP}] * (ROWS // GROUP)


def grow(root: Path, size: int) -> LabelLog:
    """Tokens and labels of `size` shards, all of them the same one, without waiting for the disk."""
    store = LocalStore(root)
    log, tokens = LabelLog.open(store, IDENTITY), tokens_of(0)
    token_record = put_tokens(store, f"{FOLDER}/train", 0, tokens, GROUP)
    record = log.commit(0, tokens, labels_of(0)).model_dump_json().encode()
    commits = store.path(log.commit_key(0)).parent
    for shard in range(1, size):
        (commits / f"{shard:06d}.json").write_bytes(record)
    train, heldout = PageWriter(store, f"{FOLDER}/train"), PageWriter(store, f"{FOLDER}/heldout")
    train.add(itertools.repeat(token_record, size))
    manifest = TokenManifest.without_corpus(SEQ, 1 << 20, train.close(), group_rows=GROUP)
    manifest.model_copy(update={"heldout": heldout.close()}).save(store, f"{FOLDER}/manifest.json")
    old_log.save(store, f"{FOLDER}/old.json", itertools.repeat(token_record, size))
    os.sync()
    return log


def manifest_of(root: Path) -> TokenManifest:
    manifest = TokenManifest.load(LocalStore(root), f"{FOLDER}/manifest.json")
    assert manifest is not None
    return manifest


# Single operations.


def operations(logs: dict[int, LabelLog]) -> dict[str, dict[int, Figures]]:
    """What single operations cost on logs of 'size' shards: medians in microseconds. Leaves `SAMPLES` more shards in each."""
    manifests = {size: manifest_of(log.store.root) for size, log in logs.items()}  # type: ignore[attr-defined]
    orders = {size: TrainingOrder([LARGE_ROWS] * size, GROUP, 0, FOLLOWERS * ROWS_A_STEP) for size in logs}
    chosen = {size: random.Random(0).sample(range(size), SAMPLES) for size in logs}
    done: dict[str, Callable[[int, int], Any]] = {
        "commit": lambda size, i: logs[size].commit(size + i, tokens_of(size + i), labels_of(size + i)),
        "follow": lambda size, i: logs[size].awaited(chosen[size][i], _never),
        "poll": lambda size, i: logs[size].committed(size + SAMPLES + i),
        "find a token shard": lambda size, i: manifests[size].train.record(logs[size].store, chosen[size][i]),
        "read a group": lambda size, i: read_group(logs[size], chosen[size][i], i % (ROWS // GROUP)),
        "rows of a step": lambda size, i: orders[size].share(i % 8, i % FOLLOWERS, FOLLOWERS),
        "key of the tokens": lambda size, i: manifests[size].content,
    }
    return {name: timed(operation, list(logs)) for name, operation in done.items()}


def read_group(log: LabelLog, shard: int, group: int) -> None:
    record = log.committed(shard)
    assert record is not None
    log.read_group(shard, log.file(shard, record), group, tokens_of(0).rows(slice(group * GROUP, (group + 1) * GROUP)))


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


# Whole processes.


def driver(root: Path) -> dict[str, Callable[[], Any]]:
    log, kept = LabelLog.open(LocalStore(root), IDENTITY), dict[str, Any]()

    def order() -> None:
        manifest = kept["manifest"]
        found = TrainingOrder(manifest.train.rows, GROUP, 0, FOLLOWERS * ROWS_A_STEP)
        kept["demand"] = found.shards_until(len(manifest.train) * ROWS // (FOLLOWERS * ROWS_A_STEP))

    def seal() -> None:
        sealed, ledger = log.seal(kept["demand"], kept["manifest"])
        assert (sealed.shards, ledger.duplicates) == (len(kept["demand"]), 0)

    def open_manifest() -> None:
        kept["manifest"] = manifest_of(root)

    return {
        "open the manifest": open_manifest,
        "key of the tokens": lambda: kept["manifest"].content,
        "order and demand": order,
        "what is missing": lambda: log.missing(kept["demand"]),
        "seal": seal,
        "seal again": seal,
        "pickle the job": lambda: pickle.dumps(kept["manifest"]),
    }


def old_driver(root: Path) -> dict[str, Callable[[], Any]]:
    log, kept = LabelLog.open(LocalStore(root), IDENTITY), dict[str, Any]()

    def open_manifest() -> None:
        kept["manifest"] = old_log.load(log.store, f"{FOLDER}/old.json")

    def demand() -> Sequence[int]:
        return range(len(kept["manifest"].train))

    return {
        "open the manifest": open_manifest,
        "key of the tokens": lambda: old_log.content(kept["manifest"]),
        "order and demand": lambda: old_log.Order([r.rows for r in kept["manifest"].train], FOLLOWERS * ROWS_A_STEP),
        "what is missing": lambda: log.missing(demand()),
        "seal": lambda: old_log.ledger(log, demand()),
        "seal again": lambda: old_log.ledger(log, demand()),
        "pickle the job": lambda: pickle.dumps(kept["manifest"]),
    }


def actor(root: Path) -> dict[str, Callable[[], Any]]:
    store, kept = LocalStore(root), dict[str, TokenManifest]()

    def open_manifest() -> None:
        kept["manifest"] = manifest_of(root)

    def records() -> None:
        pages = kept["manifest"].train
        for shard in random.Random(0).sample(range(len(pages)), 20):
            pages.record(store, shard)

    return {"open the manifest": open_manifest, "records of 20 shards": records}


def old_actor(root: Path) -> dict[str, Callable[[], Any]]:
    return {"open the manifest": lambda: old_log.load(LocalStore(root), f"{FOLDER}/old.json")}


def worker(root: Path) -> dict[str, Callable[[], Any]]:
    job, kept = pickle.dumps(manifest_of(root)), dict[str, Any]()

    def unpickle() -> None:
        kept["manifest"] = pickle.loads(job)

    def first_step() -> None:
        order = TrainingOrder(kept["manifest"].train.rows, GROUP, 0, FOLLOWERS * ROWS_A_STEP)
        order.shard_count_until(1)
        order.share(0, 7, FOLLOWERS)

    return {"unpickle the job": unpickle, "order and first step": first_step}


def old_worker(root: Path) -> dict[str, Callable[[], Any]]:
    job, kept = pickle.dumps(old_log.load(LocalStore(root), f"{FOLDER}/old.json")), dict[str, Any]()

    def unpickle() -> None:
        kept["manifest"] = pickle.loads(job)

    def first_step() -> None:
        order = old_log.Order([record.rows for record in kept["manifest"].train], FOLLOWERS * ROWS_A_STEP)
        order.share(0, 7, FOLLOWERS)

    return {"unpickle the job": unpickle, "order and first step": first_step}


ROLES = {
    "driver": (old_driver, driver),
    "actor": (old_actor, actor),
    "worker": (old_worker, worker),
}


def measured(role: str, age: int, root: Path) -> Figures:
    """Seconds of everything that a role does, and the most megabytes that it took."""
    doings = ROLES[role][age](root)
    figures, most = Figures(), 0.0
    base = reset_peak()
    for name, do in doings.items():
        reset_peak()
        started = time.perf_counter()
        found = do()
        figures[f"{name}, s"] = round(time.perf_counter() - started, 3)
        most = max(most, (peak() - base) / 2**20)
        if isinstance(found, bytes):
            figures[f"{name}, MB"] = round(len(found) / 2**20, 2)
    return figures | {"extra_mb": round(most, 1)}


def processes(root: Path) -> dict[str, dict[str, Figures]]:
    found: dict[str, dict[str, Figures]] = {}
    for role in ROLES:
        found[role] = {}
        for age, name in enumerate(("old", "new")):
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                found[role][name] = alone.submit(measured, role, age, root).result()
    return found


# Decoding.


def decoding() -> dict[str, float]:
    """Rows decoded over rows used, by ranks with few rows each that keep the groups of the last step."""
    batch = RANKS * ROWS_A_STEP
    found: dict[str, float] = {}
    shards = -(-DECODED_STEPS * batch // LARGE_ROWS)
    order = TrainingOrder([LARGE_ROWS] * shards, GROUP, 0, batch)
    ranks = random.Random(0).sample(range(RANKS), WATCHED_RANKS)
    found[f"now, groups of {GROUP}"] = amplification(order.share, ranks, GROUP, lambda row: row // GROUP)
    for rows in (64, LARGE_ROWS):
        before = old_log.Order([rows] * (DECODED_STEPS * batch // rows), batch)
        found[f"before, shards of {rows}"] = amplification(before.share, ranks, rows, lambda _: 0)
    return found


def amplification(
    share: Callable[[int, int, int], Sequence[tuple[int, int]]], ranks: Sequence[int], rows: int, unit: Callable[[int], int]
) -> float:
    decoded = used = 0
    for rank in ranks:
        kept: set[tuple[int, int]] = set()
        for step in range(DECODED_STEPS - 1):
            needed = {(shard, unit(row)) for shard, row in share(step, rank, RANKS)}
            decoded, used, kept = decoded + rows * len(needed - kept), used + ROWS_A_STEP, needed
    return round(decoded / used, 3)


# Followers.


def train_through(log: LabelLog, size: int) -> Figures:
    """`FOLLOWERS` followers take some steps; CPU time of a follower's step in each quarter, and shards that each looks for."""
    order = TrainingOrder([LARGE_ROWS] * size, GROUP, 0, FOLLOWERS * ROWS_A_STEP)
    demand, quarters, looks = order.shards_until(FOLLOWED_STEPS), list[float](), 0
    known = [0] * FOLLOWERS
    began = time.process_time()
    for step in range(FOLLOWED_STEPS):
        for rank in range(FOLLOWERS):
            count = order.shard_count_until(step + 1)
            for shard in demand[known[rank] : count]:
                log.awaited(shard, _never)
                looks += 1
            known[rank] = count
            order.share(step, rank, FOLLOWERS)
        if (step + 1) * 4 % FOLLOWED_STEPS == 0:
            quarters.append(time.process_time() - began)
            began = time.process_time()
    each = [round(cpu_s / (FOLLOWED_STEPS / 4 * FOLLOWERS) * 1e6, 1) for cpu_s in quarters]
    return {
        "followers": FOLLOWERS,
        "steps": FOLLOWED_STEPS,
        "cpu_us_by_quarter": each,
        "looks_a_step": round(looks / FOLLOWED_STEPS / FOLLOWERS, 3),
    }


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
    watched, ends = Watched(log.store, log.key), []  # type: ignore[arg-type]

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
        roots = {size: Path(folder) / str(size) for size in args.sizes}
        logs = {size: grow(root, size) for size, root in roots.items()}
        most, parts = max(logs), dict[str, Any]()
        doings: dict[str, Callable[[], Any]] = {
            "processes": partial(processes, roots[most]),
            "decoding": decoding,
            "operations": partial(operations, logs),
            "train_through": partial(train_through, logs[most], most),
            "wait_together": lambda: {
                name: wait_together(logs[most], most + SAMPLES + i, pauses) for i, (name, pauses) in enumerate(PAUSES.items())
            },
        }
        for name, do in doings.items():
            parts[name] = do()
            print(json.dumps({name: parts[name]}), flush=True)
        result = {"machine": machine(), "load": round(os.getloadavg()[0], 2), "shards": most}
    keep("log_scale", result | parts | {"growth": growth(parts["operations"])})


if __name__ == "__main__":
    main()
