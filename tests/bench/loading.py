"""How much memory a rank takes on its host before its first step, beside what it takes while it trains.

    make bench-loading     prints JSON and writes it to tests/bench/results/loading.json

One, two and four ranks start a training by every strategy, from a seed and from a folder, and make a few steps. Both figures
are of the rank that took most, above what the process took before: the most until the first step, and what is held between
two later steps. They count memory of no file, so that pages of weights that only pass through do not blur them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

from keep import keep

HERE = Path(__file__).parent
SEED, VOCAB, SEQ = 0, 8192, 32
RANKS = (1, 2, 4)
STRATEGIES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"kind": "zero", "stage": stage} for stage in range(4)},
    "1f1b": {"kind": "pipeline", "stages": 2},
    "dualpipev": {"kind": "pipeline", "stages": 2, "schedule": "dualpipev"},
    "ep2": {"kind": "expert", "size": 2},
}


def training_job(width: int, blocks: int, strategy: str, ranks: int, folder: Path | None) -> Any:
    """On hard labels, of a model from `folder`, or from the seed."""
    from orchestrator.spec.train import Train
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import Initial, TrainingJob

    precision: Any = "fp32" if strategy == "zero0" else "bf16"
    train = Train(
        workers=ranks,
        global_batch=8 * ranks,
        micro_batch=1,
        precision=precision,
        parallel=STRATEGIES[strategy],  # type: ignore[arg-type]
    )
    start = shape(width, blocks, strategy) if folder is None else Initial(folder=str(folder), content="")
    return TrainingJob("student", start, VOCAB, train, SEED, "", TokenManifest.without_corpus(SEQ, VOCAB), None)


def shape(width: int, blocks: int, strategy: str) -> Any:
    from orchestrator.spec.model import Model

    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": 8, "num_key_value_heads": 8}
    sizes |= {"tie_word_embeddings": False, "intermediate_size": width if strategy == "ep2" else 4 * width}
    if strategy == "ep2":
        return Model(type="mixtral", config=sizes | {"num_local_experts": 4})
    return Model(config=sizes)


def figures(width: int, blocks: int, strategy: str, folder: Path | None) -> dict[str, int]:
    """Bytes until the first step, and between two later ones."""
    import torch
    import torch.distributed as dist

    from orchestrator.losses.schedule import ObjectiveSchedule
    from orchestrator.plan.batch import Batch
    from orchestrator.student.feed import MicroBatch
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import train_step
    from tests.bench.memory import HighWater, anonymous

    ranks = dist.get_world_size()

    def run(job: Any, steps: int, before: int) -> tuple[int, int]:
        with HighWater(anonymous) as until:
            trainer = start_trainer(job)
        schedule = ObjectiveSchedule(job.objective, job.steps, trainer.engine.device)
        generator = torch.Generator().manual_seed(trainer.data_rank)
        for step in range(steps):
            ids = [torch.randint(VOCAB, (1, SEQ + 1), generator=generator) for _ in range(Batch.of(job.train).accumulation)]
            train_step(trainer, job, schedule, step, [MicroBatch(own, None, {}, None) for own in ids])
        held = anonymous()
        trainer.engine.destroy()
        return until.value - before, held - before

    run(training_job(64, 4, strategy, ranks, None), 2, 0)  # what is imported on the way is no part of it
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    own = run(training_job(width, blocks, strategy, ranks, folder), 3, anonymous())
    taken: list[Any] = [None] * ranks
    dist.all_gather_object(taken, own)
    worst = max(taken, key=lambda pair: pair[0] / pair[1])
    return {"until_first_step": worst[0], "steady": worst[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS, default=list(RANKS))
    args = parser.parse_args()
    sys.path.append(str(HERE.parent.parent))
    from orchestrator.models.build import build_model
    from tests.parity.ranks import run_on_ranks

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for strategy in args.strategies:
            folder = root / ("experts" if strategy == "ep2" else "dense")
            model = build_model(shape(args.width, args.blocks, strategy), VOCAB, SEED + 1, "student")
            model.save_pretrained(folder, save_original_format=False)
            weights = 4 * model.num_parameters()
            for ranks in args.ranks:
                if ranks == 1 and STRATEGIES[strategy]["kind"] != "zero":
                    continue
                for start, source in (("seed", None), ("folder", folder)):
                    taken = run_on_ranks(ranks, root, figures, args.width, args.blocks, strategy, source)
                    found[f"{strategy} x{ranks} {start}"] = {
                        "fp32_weights_mb": weights >> 20,
                        **{name: value >> 20 for name, value in taken.items()},
                        "ratio": round(taken["until_first_step"] / taken["steady"], 2),
                    }
    keep("loading", {"mb": found, "worst_ratio": max(case["ratio"] for case in found.values())})


if __name__ == "__main__":
    main()
