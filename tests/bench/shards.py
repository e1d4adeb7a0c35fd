"""What sharding a teacher costs and saves. Run: make bench-shards

Memory: a llama of 111M parameters, stored in fp32, as bf16 in 1, 2 and 4 processes: by how much loading it makes a process
grow, against its share of the weights. The file is mapped, and pages of it are the kernel's to drop; they are counted apart.
Equality: Gemma 3 270M, converted by the gemma job, in 1 and in 2 processes and in float64. Pool: replicas of a tiny teacher,
1 to 2, over one labelling that may run ahead of its student by a few shards. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.models.build import build_model, load_model
from orchestrator.spec.model import Model
from orchestrator.teacher.backend import Replica, TransformersBackend
from tests.bench.memory import HighWater, anonymous, peak, reset_peak
from tests.parity.ranks import run_on_ranks
from tests.tiny import distill, metric_points, tiny_job, write_corpus, write_job

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 8}
VOCAB = 16384
ROWS, SEQ = 4, 128
TEXT = Path(json.__file__).read_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--storage", type=Path, default=Path("distill-store"), help="Where the gemma job has put its teacher.")
    storage = parser.parse_args().storage
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {"memory": memory(folder), "pool": pool(folder)}
        gemma = [
            f.parent
            for f in storage.glob("teacher/*/model/model.safetensors")
            if "gemma3" in (f.parent / "config.json").read_text()
        ]
        if gemma:
            figures["gemma"] = compare(folder, gemma[0])
    print(json.dumps(figures))


def memory(folder: Path) -> dict[str, Any]:
    """Per number of shards: MiB of weights due to each, and MiB by which the most needy process grew."""
    model = build_model(Model(config={**WIDE, "num_key_value_heads": 8}), VOCAB, 0, "teacher")
    model.save_pretrained(folder / "wide")
    size = sum(p.numel() for p in model.parameters()) * 2
    del model
    gc.collect()
    found = {f"{n}": run_on_ranks(n, folder, loaded, str(folder / "wide")) for n in (1, 2, 4)}
    return {"weights_mib": size >> 20, **{n: {"share_mib": (size // int(n)) >> 20, **mib} for n, mib in found.items()}}


def loaded(folder: str) -> dict[str, int]:
    """Growth of the largest process while it loads: memory of its own at its peak and after, and all that was mapped."""
    gc.collect()
    before, own = reset_peak(), anonymous()
    with HighWater(anonymous) as high:
        teacher = TransformersBackend(Replica(folder, "bf16", shards=dist.get_world_size()))
    gc.collect()
    grown = torch.tensor([high.value - own, anonymous() - own, peak() - before])
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    del teacher
    return dict(zip(("peak_mib", "kept_mib", "peak_with_file_pages_mib"), (grown >> 20).tolist(), strict=True))


def compare(folder: Path, gemma: Path) -> dict[str, Any]:
    """Gemma on 1 and on 2 processes: largest distance of log-probabilities in fp32, tokens per second, memory in bf16."""
    ids = AutoTokenizer.from_pretrained(gemma)(TEXT)["input_ids"][: ROWS * SEQ]
    told = {n: run_on_ranks(n, folder, said, str(gemma), ids, str(folder)) for n in (1, 2)}
    one, two = (torch.load(folder / f"said-{n}.pt").double() for n in (1, 2))
    model = load_model(gemma, "fp32", torch.device("cpu")).double()
    with torch.no_grad():
        exact = model(input_ids=torch.tensor(ids[:SEQ])[None], use_cache=False).logits[0].log_softmax(-1)
    pairs = {"one_and_two": (one, two), "exact_and_one": (exact, one), "exact_and_two": (exact, two)}
    apart = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
    same = float((one.argmax(-1) == two.argmax(-1)).float().mean())
    return {"nats_apart": apart, "same_best": same, **{f"{n}": figures for n, figures in told.items()}}


def said(folder: str, ids: list[int], answers: str) -> dict[str, float]:
    shards = dist.get_world_size()
    rows = torch.tensor(ids).view(ROWS, SEQ)
    exact = TransformersBackend(Replica(folder, "fp32", shards=shards))
    log_probs = torch.cat([logits.log_softmax(-1) for logits in exact.answer(rows[:1]).logits()])
    if dist.get_rank() == 0:
        torch.save(log_probs.clone(), Path(answers) / f"said-{shards}.pt")
    del exact, log_probs
    gc.collect()
    before = reset_peak()
    teacher = TransformersBackend(Replica(folder, "bf16", shards=shards))
    grown = torch.tensor([peak() - before])
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    began = time.perf_counter()
    for logits in teacher.answer(rows).logits():
        logits.argmax(-1)
    return {"peak_mib": int(grown) >> 20, "tokens_per_s": round(rows.numel() / (time.perf_counter() - began), 1)}


def pool(folder: Path) -> list[list[float]]:
    """[seconds since the first shard, replicas] whenever their number changed."""
    job = tiny_job(write_corpus(folder / "corpus"), folder / "store")
    job |= {"teacher": job["teacher"] | {"replicas": {"min": 1, "max": 2}, "cpus_per_shard": 0.5}}
    job |= {"labels": job["labels"] | {"run_ahead": 8}, "train": job["train"] | {"steps": 1000}}
    distill(folder / "log", "run", write_job(job)).assert_ok()
    points = [p for p in metric_points(folder / "store", "labels") if "label/replicas" in p["metrics"]]
    counts = [(p["time_s"] - points[0]["time_s"], p["metrics"]["label/replicas"]) for p in points]
    return [[round(at, 1), count] for i, (at, count) in enumerate(counts) if i == 0 or counts[i - 1][1] != count]


if __name__ == "__main__":
    main()
