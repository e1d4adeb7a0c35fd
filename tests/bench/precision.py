"""Seconds of CPU of one training step of the quickstart's models in fp32 and in bf16, on one thread, in turn.

make bench-precision        prints JSON and writes it to tests/bench/results/precision.json
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from keep import keep

from orchestrator.models.build import build_model
from orchestrator.spec.load import load_job

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
ROWS, ROUNDS, VOCAB = 4, 5, 4096


def step(model: Any, ids: torch.Tensor) -> float:
    """Forward and backward pass of `model` on `ids` [rows, seq + 1]; returns seconds of CPU."""
    started = time.process_time()
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.zero_grad()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    job: Any = load_job(JOB)
    ids = torch.randint(VOCAB, (ROWS, job.data.seq_len + 1), generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {}
    for name, model in (("teacher", job.teacher.model), ("student", job.student.model)):
        built = {dtype: build_model(model, VOCAB, 0, name).to(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
        rounds = [{dtype: step(each, ids) for dtype, each in built.items()} for _ in range(ROUNDS + 1)][1:]
        median = {dtype: statistics.median(seconds[dtype] for seconds in rounds) for dtype in built}
        result[name] = median | {"bf16_over_fp32": statistics.median(s["bfloat16"] / s["float32"] for s in rounds)}
    keep("precision", result)


if __name__ == "__main__":
    main()
