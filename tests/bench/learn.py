"""What each kind of soft label, and each inner-layer term, is worth: held-out CE of the quickstart's student, three seeds each.

    make learn          runs what is missing of the quickstart, trains, prints JSON, writes tests/bench/results/learn.json

Equal rows, steps, initial weights per seed; the teacher is the quickstart's. Labels are made on the fly from the teacher's
stored hidden states, so every variant sees the same teacher. A plain loop on one thread; two seeds run side by side.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from keep import keep
from plain import PlainLoop

from orchestrator.labels.answer import Answer
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.head import last_hidden, load_head, output_head
from orchestrator.plan.batch import Batch
from orchestrator.spec.job import Job
from orchestrator.spec.labels import kept_features
from orchestrator.spec.load import load_job
from orchestrator.store.heldout import measured_rows
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MODEL, TokenManifest
from orchestrator.store.shards import TokenShard, read_tokens
from orchestrator.student.engine import build_distiller
from orchestrator.student.feed import MicroBatch
from orchestrator.student.job import Soft, TrainingJob
from orchestrator.teacher.backend import Replica, TransformersBackend

HERE = Path(__file__).parent
JOB = HERE.parent.parent / "jobs" / "quickstart.yaml"
SEEDS = (0, 1, 2)
INNER = "labels.features={keep: [{layer: 4}, {layer: 4, part: values}], codec: fp16}"
VARIANTS: dict[str, list[str] | None] = {
    "cross entropy alone": None,
    "top-12 renormalised": ["labels.kind=topk", "labels.k=12", "labels.renormalize=true"],
    "top-50 + tail": ["labels.kind=topk", "labels.k=50"],
    "sampled N=12": ["labels.samples=12"],
    "sampled N=25": ["labels.samples=25"],
    "sampled N=50": [],
    "sampled N=50, multinomial": ["labels.method=multinomial"],
    "hidden (exact)": ["labels.kind=hidden"],
    "sampled N=50 + mse of the last layer": [INNER, "objective.features=[{kind: mse, weight: 0.1}]"],
    "sampled N=50 + value relations": [INNER, "objective.features=[{kind: minilm, weight: 1.0}]"],
}


@dataclass(frozen=True)
class Case:
    """The quickstart's tokens and teacher."""

    store: LocalStore
    data_folder: str
    manifest: TokenManifest
    teacher: str

    def training(self, job: Job, variant: bool) -> TrainingJob:
        soft = Soft("", job.labels, job.objective, self.teacher, job.teacher.dtype) if variant else None
        return TrainingJob(
            "student", job.student.model, self.manifest.vocab_size, job.train, job.seed, self.data_folder, self.manifest, soft
        )


def main() -> None:
    distill = Path(sys.executable).parent / "distill"
    subprocess.run([distill, "run", JOB, "--set", "tracking.enabled=false"], stdout=subprocess.DEVNULL, check=True)
    with ProcessPoolExecutor(2) as pool:
        by_seed = list(pool.map(train_seed, SEEDS))
    rows = {name: [found[name] for found in by_seed] for name in VARIANTS}
    exact = rows["hidden (exact)"]
    table = {
        name: {
            "heldout_ce_nats": [round(r, 4) for r in values],
            "mean": round(statistics.mean(values), 4),
            "above_exact": round(statistics.mean(v - e for v, e in zip(values, exact, strict=True)), 4),
        }
        for name, values in rows.items()
    }
    result = {"job": JOB.name, "seeds": SEEDS, "variants": table}
    keep("learn", result)


def quickstart(overrides: list[str]) -> tuple[Job, Case]:
    job = load_job(JOB, overrides)
    store = LocalStore(job.storage)
    run = json.loads(store.path(f"runs/{job.name}/report.json").read_text())["fingerprints"]
    manifest = TokenManifest.load(store, f"data/{run['data']}/manifest.json")
    assert manifest is not None
    return job, Case(store, f"data/{run['data']}", manifest, store.address(f"teacher/{run['teacher']}/{MODEL}"))


def train_seed(seed: int) -> dict[str, float]:
    """Held-out CE in nats by variant."""
    torch.set_num_threads(1)
    job, case = quickstart([INNER, f"seed={seed}"])
    lessons = answered(job, case)
    return {name: train_variant(seed, overrides, lessons) for name, overrides in VARIANTS.items()}


def train_variant(seed: int, overrides: list[str] | None, lessons: list[list[Lesson]]) -> float:
    job, case = quickstart([*(overrides or []), f"seed={seed}"])
    training = case.training(job, overrides is not None)
    distiller = build_distiller(training)
    loop = PlainLoop(distiller, job.train)
    schedule = ObjectiveSchedule(training.objective, job.train.steps, torch.device("cpu"))
    frame = Frame(
        case.manifest.vocab_size, case.manifest.seq_len, load_head(Path(case.teacher), torch.bfloat16, torch.device("cpu"))
    )
    codec = None if overrides is None else Codec(job.labels, frame)
    for step, parts in enumerate(lessons):
        loop.step(step, [lesson.taught(codec) for lesson in parts], schedule.at(step))
    ce = heldout_ce(case, distiller.model, job.evaluate.rows)
    print(f"seed {seed}: {overrides}: {ce:.4f}", file=sys.stderr, flush=True)
    return ce


@dataclass(frozen=True)
class Lesson:
    """Rows of one micro-batch and what the teacher says about them."""

    ids: torch.Tensor
    row_ids: list[bytes]
    answer: Answer

    def taught(self, codec: Codec | None) -> MicroBatch:
        if codec is None:
            return MicroBatch(self.ids, None, {})
        arrays = codec.extract(self.answer, self.row_ids)
        return MicroBatch(self.ids, codec.targets(arrays, 1.0), codec.features(arrays))


def answered(job: Job, case: Case) -> list[list[Lesson]]:
    """All micro-batches of a training, by step, each with the teacher's answer."""
    training, teacher = (
        case.training(job, False),
        TransformersBackend(Replica(case.teacher, job.teacher.dtype, kept_features(job.labels))),
    )
    size, shards = Batch.of(job.train).micro_rows, dict[int, TokenShard]()
    lessons: list[list[Lesson]] = []
    for step in range(job.train.steps):
        rows, parts = training.order.batch(step), list[Lesson]()
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            for s, _ in part:
                if s not in shards:
                    pages = case.manifest.train
                    shards[s] = read_tokens(case.store, pages.folder, pages.record(case.store, s))
            ids = torch.stack([torch.from_numpy(shards[s].ids[r]).long() for s, r in part])
            parts.append(Lesson(ids, [shards[s].row_ids[r] for s, r in part], teacher.answer(ids[:, :-1])))
        lessons.append(parts)
    return lessons


@torch.no_grad()
def heldout_ce(case: Case, model: Any, rows: int) -> float:
    """Mean CE in nats on the windows that the quickstart is measured on."""
    total = count = 0.0
    windows = measured_rows(case.store, case.data_folder, case.manifest, rows, 0).ids
    for part in torch.from_numpy(windows).long().split(8):
        logits = output_head(model)(last_hidden(model, part[:, :-1]).flatten(0, 1))
        total += float(torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
    return total / count


if __name__ == "__main__":
    main()
