"""How long training stands still for a checkpoint: saved before it goes on, and written beside it.

    make bench-checkpoint     prints JSON and writes it to tests/bench/results/checkpoint.json

Ranks train a model on random ids and save their state both ways, in turns, to a directory. The stall is the time that the rank
that stood still longest did so, when it began and before its next update of the weights; beside it stands what a step takes
while nothing is written, and while something is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from keep import keep

HERE = Path(__file__).parent
RANKS, SEED, VOCAB, SEQ, ROUNDS = 2, 0, 8192, 64, 4
STAGES = (1, 3)


def training_job(width: int, blocks: int, stage: int) -> Any:
    from orchestrator.spec.model import Model
    from orchestrator.spec.train import Train
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import TrainingJob

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    model = Model(config=sizes | {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False})
    train = Train(workers=RANKS, global_batch=RANKS, micro_batch=1, parallel={"kind": "zero", "stage": stage})  # type: ignore[arg-type]
    return TrainingJob("student", model, VOCAB, train, SEED, "", TokenManifest.without_corpus(SEQ, VOCAB), None)


def measured(width: int, blocks: int, stage: int, root: Path) -> dict[str, Any]:
    """Seconds of both ways and of steps; of the rank that took longest."""
    import torch
    import torch.distributed as dist

    from orchestrator.losses.schedule import ObjectiveSchedule
    from orchestrator.store.local import LocalStore
    from orchestrator.student.checkpoint import CheckpointWriter
    from orchestrator.student.feed import MicroBatch
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import train_step

    job, store = training_job(width, blocks, stage), LocalStore(root / str(stage))
    trainer = start_trainer(job)
    schedule = ObjectiveSchedule(job.objective, job.steps, trainer.engine.device)
    writer = CheckpointWriter(trainer.engine, schedule, store, job.folder)
    ids, done = torch.randint(VOCAB, (1, SEQ + 1)), 0

    def step() -> float:
        nonlocal done
        dist.barrier()
        started = time.perf_counter()
        train_step(trainer, job, schedule, done, [MicroBatch(ids, None, {}, None)])
        done += 1
        return time.perf_counter() - started

    def longest(seconds: float) -> float:
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def beside_a_write() -> tuple[float, list[float]]:
        """The stall of a checkpoint, and the steps until it is durable."""
        writer.start(done)
        steps, saved = list[float](), None
        while longest(float(saved is None and dist.get_rank() == 0)):
            steps.append(longest(step()))
            saved = saved or writer.settled()
        writer.finish()
        saved = saved or writer.settled()
        assert saved is not None
        return longest(saved.stalled_s), steps

    step()
    alone = [longest(step()) for _ in range(5)]
    first, _ = beside_a_write()
    waited, stalled, beside = list[float](), list[float](), list[float]()
    for _ in range(ROUNDS):
        step()
        dist.barrier()
        started = time.perf_counter()
        writer.save_now(done)
        waited.append(longest(time.perf_counter() - started))
        writer.settled()
        stall, steps = beside_a_write()
        stalled.append(stall)
        beside += steps
    newest = store.path(f"{job.folder}/checkpoints/{store.keys(f'{job.folder}/checkpoints')[-1]}")
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    trainer.engine.destroy()
    at_once, stall = statistics.median(waited), statistics.median(stalled)
    return {
        "checkpoint_mb": size >> 20,
        "saved_at_once_s": round(at_once, 3),
        "stall_s": round(stall, 4),
        "stall_of_the_first_s": round(first, 4),
        "stall_per_saved_at_once": round(stall / at_once, 4),
        "step_s": round(statistics.median(alone), 3),
        "step_beside_a_write_s": round(statistics.median(beside), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=8)
    args = parser.parse_args()
    sys.path.append(str(HERE.parent.parent))
    from tests.parity.ranks import run_on_ranks

    result: dict[str, Any] = {"ranks": RANKS}
    with tempfile.TemporaryDirectory(dir=HERE) as folder:  # a disk, where /tmp may be memory
        for stage in STAGES:
            result[f"zero{stage}"] = run_on_ranks(RANKS, Path(folder), measured, args.width, args.blocks, stage, Path(folder))
    keep("checkpoint", result)


if __name__ == "__main__":
    main()
