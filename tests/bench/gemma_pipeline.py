"""Gemma 3 270M with its real weights through a pipeline: three steps on two ranks, saved and read again, beside one process.

    make bench-gemma-pipeline    after `make gemma`; prints JSON and writes it to tests/bench/results/gemma_pipeline.json

Both start from the same folder, as a student of kind `checkpoint` does, and take the same windows of the standard library's
source in fp32. What is compared are the logits that transformers computes from what each has saved, on a window that neither
has seen; how far the three steps have moved them is the measure.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from keep import keep

HERE = Path(__file__).parent
SEQ, ROWS, STEPS, RATE = 32, 4, 3, 1e-4
ALONE = {"kind": "zero", "stage": 0}
TOLERANCE = 2e-5
"""How far logits may be apart, as a share of the largest; three steps must have moved them by a hundred times as much."""


def prepare(root: Path, source: Path | None) -> None:
    """`root/model` with weights and tokenizer, and windows [ROWS * STEPS + 1, SEQ + 1] in `root/windows.pt`."""
    import torch
    from prune import load, text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source is None:
        model, tokenizer = load()
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    model.save_pretrained(root / "model", save_original_format=False)
    tokenizer.save_pretrained(root / "store" / "tokenizer")
    torch.save(torch.tensor(list(itertools.islice(text(tokenizer, SEQ), ROWS * STEPS + 1))), root / "windows.pt")


def training_job(root: Path, parallel: dict[str, Any], workers: int) -> Any:
    from orchestrator.models.hub import vocab_size_of
    from orchestrator.spec.train import Train
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import Initial, TrainingJob

    batch = {"global_batch": ROWS, "micro_batch": 1, "workers": workers, "steps": STEPS, "warmup_steps": 1}
    train = Train.model_validate(batch | {"learning_rate": RATE, "precision": "fp32", "parallel": parallel})
    vocab = vocab_size_of(root / "model", "student.path")
    manifest = TokenManifest.without_corpus(SEQ, vocab)
    return TrainingJob("student", Initial(folder=str(root / "model"), content=""), vocab, train, 0, "", manifest, None)


def train(root: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Train and save; the losses, and the most memory that each rank took."""
    import torch
    import torch.distributed as dist

    from orchestrator.losses.schedule import ObjectiveSchedule
    from orchestrator.store.files import Store
    from orchestrator.student.feed import MicroBatch
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import save_model, train_step
    from tests.bench.memory import peak

    job = training_job(root, parallel, dist.get_world_size())
    windows = torch.load(root / "windows.pt")
    trainer, schedule, losses = start_trainer(job), ObjectiveSchedule(job.objective, STEPS, torch.device("cpu")), []
    for step, rows in enumerate(windows[: ROWS * STEPS].split(ROWS)):
        micro_batches = [MicroBatch(row[None], None, {}) for row in rows]
        losses.append(float(train_step(trainer, job, schedule, step, micro_batches).means[0]))
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak() >> 20)
    save_model(trainer, Store(root / "store"), job, "tokenizer", {})
    return {"losses": losses, "peak_mb": peaks}


def logits(root: Path, folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    with torch.no_grad():
        return model.eval()(input_ids=torch.load(root / "windows.pt")[-1:, :-1]).logits[0]


def compare(root: Path, schedule: str) -> dict[str, Any]:
    from tests.parity.ranks import run_on_ranks

    cut = {"kind": "pipeline", "stages": 2, "schedule": schedule}
    runs, saved = {}, {"before": logits(root, root / "model")}
    for name, ranks, parallel in (("alone", 1, ALONE), ("cut", 2, cut)):
        started = time.monotonic()
        runs[name] = run_on_ranks(ranks, root, train, root, parallel) | {"seconds": round(time.monotonic() - started)}
        job = training_job(root, parallel, ranks)
        saved[name] = logits(root, root / "store" / job.folder / "model")
    largest = float(saved["alone"].abs().max())
    off, moved = (float((saved[name] - saved["alone"]).abs().max()) / largest for name in ("cut", "before"))
    assert off < TOLERANCE, f"the pipeline's logits are off by {off:.1e}"
    assert moved > 100 * TOLERANCE, f"three steps moved the logits by {moved:.1e} only"
    return {"schedule": schedule, "logits_off": off, "logits_moved": moved, **runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with the weights and the tokenizer; otherwise from the package")
    parser.add_argument(
        "--schedule",
        choices=["1f1b", "dualpipev"],
        default="dualpipev",
        help="with dualpipev the tied embedding, most of this model, is on one rank; with 1f1b on both",
    )
    args = parser.parse_args()
    sys.path.append(str(HERE.parent.parent))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.model)
        result = compare(Path(folder), args.schedule)
    keep("gemma_pipeline", result)


if __name__ == "__main__":
    main()
