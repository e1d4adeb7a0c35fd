"""How much memory a rank takes on its host until DeepSpeed has what it trains: the whole model, as it was, or a share of it.

    make bench-loading     prints JSON and writes it to tests/bench/results/loading.json

Two ranks start the same training both ways, from a seed and from a folder, under ZeRO-3 and as two stages of a pipeline. The
figure is the most that was resident above what was before, of the rank that took more, as a share of the model's fp32 weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from keep import keep

HERE = Path(__file__).parent
RANKS, SEED, VOCAB = 2, 0, 8192
WAYS = ("whole", "share")
STRATEGIES: dict[str, dict[str, Any]] = {
    "zero3": {"kind": "zero", "stage": 3},
    "1f1b": {"kind": "pipeline", "stages": RANKS},
    "dualpipev": {"kind": "pipeline", "stages": RANKS, "schedule": "dualpipev"},
}


class Ready(Exception):
    """DeepSpeed would have been given the model now."""


def training_job(width: int, blocks: int, strategy: str, folder: Path | None) -> Any:
    """On hard labels, of a model from `folder`, or from the seed."""
    from orchestrator.spec.train import Train
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import Initial, TrainingJob

    train = Train(workers=RANKS, micro_batch=1, parallel=STRATEGIES[strategy])  # type: ignore[arg-type]
    manifest = TokenManifest.without_corpus(8, VOCAB)
    start = shape(width, blocks) if folder is None else Initial(folder=str(folder), content="")
    return TrainingJob("student", start, VOCAB, train, SEED, "", manifest, None)


def shape(width: int, blocks: int) -> Any:
    from orchestrator.spec.model import Model

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    return Model(config=sizes | {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False})


def save_whole(width: int, blocks: int, folder: Path) -> int:
    """A model with other weights than those of the seed, written to `folder`; the bytes of its weights."""
    from orchestrator.models.build import build_model

    model = build_model(shape(width, blocks), VOCAB, SEED + 1, "student")
    model.save_pretrained(folder)
    return 4 * model.num_parameters()


def peaks(width: int, blocks: int, strategies: list[str], folder: Path) -> dict[str, float]:
    """Bytes by strategy, start and way; of the rank that took most."""
    found = {}
    for strategy in strategies:
        peak_until_ready(training_job(64, 4, strategy, None), "share")  # what is imported on the way is no part of it
        for start, source in (("seed", None), ("folder", folder)):
            for way in WAYS:
                found[f"{strategy} {start} {way}"] = peak_until_ready(training_job(width, blocks, strategy, source), way)
    return found


def peak_until_ready(job: Any, way: str) -> int:
    import torch.distributed as dist

    from orchestrator.student import pipelined, replicated
    from orchestrator.student.distiller import start_model
    from orchestrator.student.trainer import start_trainer
    from tests.bench.memory import peak, reset_peak

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what the last one left would not be counted again
    with ExitStack() as patches:
        for module in (pipelined, replicated):
            patches.enter_context(patch.object(module, "start_engine", side_effect=Ready))
        if way == "whole":
            patches.enter_context(patch.object(replicated.Replicated, "_share", lambda _self, _job: None))
            patches.enter_context(patch.object(replicated, "partition"))
            patches.enter_context(patch.object(pipelined, "start_model", lambda job, _share: start_model(job)))
        before = reset_peak()
        try:
            start_trainer(job)
        except Ready:
            taken: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(taken, peak() - before)
            return max(taken)
    raise AssertionError("no engine was started")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=10)
    args = parser.parse_args()
    sys.path.append(str(HERE.parent.parent))
    from tests.parity.ranks import run_on_ranks

    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights = save_whole(args.width, args.blocks, root / "model")
        for strategies in (["zero3"], ["1f1b", "dualpipev"]):  # DeepSpeed keeps the layout that its ranks had
            found |= run_on_ranks(RANKS, root, peaks, args.width, args.blocks, strategies, root / "model")
    result = {
        "weights_mb": weights >> 20,
        "ranks": RANKS,
        "peak_mb": {name: taken >> 20 for name, taken in found.items()},
        "peak_per_weights": {name: round(taken / weights, 2) for name, taken in found.items()},
    }
    keep("loading", result)


if __name__ == "__main__":
    main()
