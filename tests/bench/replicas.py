"""Label throughput of 1, 2 and 4 teacher replicas, and what Ray adds to a shard.

    make bench-replicas     prints one JSON line last and writes it to tests/bench/results/replicas.json

The real pool on a local Ray: the quickstart's teacher with first weights, one thread a replica, N=50 draws, shards of 2,048
tokens that are labelled and committed. Every round has all variants one after the other, and the same labeller on the same
shards in a loop without Ray. Figures are taken while all replicas are at work: from the end of the warm-up to the last
shards. Wall time says something only while there is a free core for each replica; tokens per CPU-second of the teachers'
processes are what a replica makes of the share of a core that it gets. Ray's milliseconds per shard are the time of a
shard through a pool of one less the labeller's own, and the CPU time of all processes that are not teachers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from keep import keep, machine

from orchestrator.models.build import build_model
from orchestrator.runtime.board import start_board
from orchestrator.runtime.environment import prepare_ray
from orchestrator.spec.labels import SampledLabels
from orchestrator.spec.model import Model, Replicas, TeacherBase
from orchestrator.store.claims import Claims
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MANIFEST, TokenManifest
from orchestrator.store.shard_pages import paged
from orchestrator.store.shards import TokenShard, put_tokens
from orchestrator.teacher.backend import Replica
from orchestrator.teacher.placement import Placement
from orchestrator.teacher.pool import label_shards
from orchestrator.teacher.task import Item, LabelTask
from orchestrator.teacher.writer import ShardWriter

POOLS = (1, 2, 4)
SHARDS, ROWS, SEQ = 64, 8, 256
WARM, LAST = 16, 56
"""Receipts between which figures are taken."""
TOKENS = (LAST - WARM) * ROWS * SEQ
VOCAB = 4096
MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER = "MapBatches(Labeller)"
"""In the title of a teacher actor's process."""

Figures = dict[str, float]


def prepare(store: LocalStore) -> LabelTask:
    """A teacher and token shards in `store`, and the work of labelling them into no log yet."""
    model = build_model(Model(type="llama", config=MODEL | {"tie_word_embeddings": True}), VOCAB, 0, "teacher")
    model.save_pretrained(store.path("teacher"))
    ids = np.random.default_rng(0).integers(0, VOCAB, (SHARDS, ROWS, SEQ + 1), dtype=np.int32)
    tokens = [TokenShard([f"{s:08d}{r:08d}".encode() for r in range(ROWS)], ids[s]) for s in range(SHARDS)]
    records = [put_tokens(store, "data/train", index, shard, 16) for index, shard in enumerate(tokens)]
    manifest = TokenManifest.without_corpus(SEQ, VOCAB, paged(store, "data/train", records))
    manifest.save(store, f"data/{MANIFEST}")
    return LabelTask(
        store=store,
        data_folder="data",
        replica=Replica(store.address("teacher"), "bf16"),
        vocab_size=VOCAB,
        labels=SampledLabels(samples=50, run_ahead=None),
        log_key="",
        micro_batch=4,
        board=None,
        claims=Claims(store, "", "bench"),
    )


@dataclass(frozen=True)
class Spent:
    """A moment, and the CPU time spent until then."""

    wall_s: float
    teachers_s: float
    others_s: float
    """Of this process and everything that Ray runs, but the teachers."""

    @classmethod
    def now(cls) -> Spent:
        own = psutil.Process()
        teachers = others = 0.0
        for process in [own, *own.children(recursive=True)]:
            times = process.cpu_times()
            if TEACHER in " ".join(process.cmdline()):
                teachers += times.user + times.system
            else:
                others += times.user + times.system
        return cls(time.perf_counter(), teachers, others)


def pooled(work: LabelTask, replicas: int) -> Figures:
    """Label all shards with a pool of `replicas`."""
    shards = [(shard, shard) for shard in range(SHARDS)]
    moments: dict[int, Spent] = {}
    own_s: list[float] = []
    room = Placement("bench", TeacherBase(), print)
    for done, receipt in enumerate(label_shards(work, shards, Replicas(min=replicas, max=replicas), room), start=1):
        own_s.append(receipt["seconds"])
        if done in (WARM, LAST):
            moments[done] = Spent.now()
    begin, end = moments[WARM], moments[LAST]
    wall_s, each_s = end.wall_s - begin.wall_s, statistics.fmean(own_s[WARM:LAST])
    shards_taken = LAST - WARM
    return {
        "tokens_per_s": TOKENS / wall_s,
        "tokens_per_cpu_s": TOKENS / (end.teachers_s - begin.teachers_s),
        "shard_ms": 1000 * wall_s * replicas / shards_taken,
        "labeller_ms": 1000 * each_s,
        "ray_ms": 1000 * (wall_s * replicas / shards_taken - each_s),
        "ray_cpu_ms": 1000 * (end.others_s - begin.others_s) / shards_taken,
    }


def bare(work: LabelTask) -> Figures:
    """Label all shards in a loop, in a process of its own."""
    writer = ShardWriter(work)
    for shard in range(SHARDS):
        if shard == WARM:
            began, started = time.process_time(), time.perf_counter()
        if shard == LAST:
            wall_s, cpu_s = time.perf_counter() - started, time.process_time() - began
        writer.commit(writer.ask(Item("shard", shard, shard)))
    return {"tokens_per_s": TOKENS / wall_s, "tokens_per_cpu_s": TOKENS / cpu_s, "shard_ms": 1000 * wall_s / (LAST - WARM)}


def into_log(work: LabelTask, name: str) -> LabelTask:
    log = LabelLog.open(work.store, {"bench": name})
    return replace(work, log_key=log.key, claims=Claims(work.store, log.folder, "bench"))


def one_round(work: LabelTask, board: Any, number: int) -> dict[str, Figures]:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        found = {"bare": fresh.submit(bare, into_log(work, f"bare {number}")).result()}
    for replicas in POOLS:
        found[f"pool of {replicas}"] = pooled(replace(into_log(work, f"{replicas} {number}"), board=board), replicas)
        print(json.dumps(found), flush=True)
    return found


def summary(rounds: list[dict[str, Figures]]) -> dict[str, Any]:
    """Medians over rounds; ratios are taken inside a round."""
    medians = {
        name: {figure: round(statistics.median(r[name][figure] for r in rounds), 2) for figure in rounds[0][name]}
        for name in rounds[0]
    }
    ratios: dict[str, float] = {}
    for replicas in POOLS:
        name = f"pool of {replicas}"
        for figure, share in (("tokens_per_cpu_s", 1), ("tokens_per_s", replicas)):
            over_one = [r[name][figure] / share / r["pool of 1"][figure] for r in rounds]
            ratios[f"efficiency of {replicas}, {figure}"] = round(statistics.median(over_one), 3)
    for figure in ("tokens_per_s", "tokens_per_cpu_s"):
        over_bare = [r["pool of 1"][figure] / r["bare"][figure] for r in rounds]
        ratios[f"pool of 1 over bare, {figure}"] = round(statistics.median(over_bare), 3)
    return {"medians": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prepare_ray(local=True)
    with tempfile.TemporaryDirectory(prefix="rep-", ignore_cleanup_errors=True) as folder:
        work = prepare(LocalStore(Path(folder) / "store"))
        ray.init(address="local", num_cpus=max(POOLS), include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/ray")
        board = start_board()
        loads, rounds = [], []
        for number in range(args.rounds):
            rounds.append(one_round(work, board, number))
            loads.append(os.getloadavg()[0])
        ray.shutdown()
    result = {
        "machine": machine(),
        "cores": os.cpu_count(),
        "load": round(max(loads), 2),
        "tokens_a_shard": ROWS * SEQ,
        **summary(rounds),
        "rounds": rounds,
    }
    keep("replicas", result)


if __name__ == "__main__":
    main()
