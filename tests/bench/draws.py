"""Systematic against multinomial draws, and top-k, on real teachers and real text.

    make draws          after `make quickstart` and `make gemma`; prints JSON and writes it to tests/bench/results/draws.json

For each teacher, on training windows of its job: mean squared error of the labels against the teacher's probabilities,
unique ids, bytes per token as stored (whole shards), entropy bound, coding speed on one thread, and the angle per token
between the gradient by the logits that the labels give the trained student and that of full distillation.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from keep import keep

from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import LabelKind, label_kind
from orchestrator.labels.layout import Arrays, Columns, Frame, join
from orchestrator.labels.sampled import Sampled
from orchestrator.labels.setcode import decode_sets, encode_sets, entropy_bound
from orchestrator.labels.targets import Sparse
from orchestrator.models.build import load_model
from orchestrator.models.head import last_hidden, output_head
from orchestrator.spec.labels import Labels, SampledLabels, TopkLabels
from orchestrator.spec.load import load_job
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MODEL, TokenManifest
from orchestrator.store.row_groups import to_parquet
from orchestrator.store.shards import read_tokens
from orchestrator.teacher.backend import Replica, TransformersBackend

HERE = Path(__file__).parent
JOBS = HERE.parent.parent / "jobs"
SHARDS = {"quickstart": 1, "gemma-270m": 2}
"""Token shards that are labelled: 64 windows of 256 tokens, 32 of 128."""
ROWS_AT_A_TIME = 2
SIZES = (12, 25, 50, 100)


@dataclass(frozen=True)
class Text:
    """Windows of a finished job with its teacher and its student."""

    teacher: TransformersBackend
    student: Any
    ids: torch.Tensor
    row_ids: list[bytes]
    vocab_size: int

    @property
    def frame(self) -> Frame:
        return Frame(self.vocab_size, self.ids.shape[1] - 1)

    def batches(self) -> Iterator[tuple[torch.Tensor, list[bytes], Answer]]:
        for start in range(0, len(self.ids), ROWS_AT_A_TIME):
            part = self.ids[start : start + ROWS_AT_A_TIME]
            yield part, self.row_ids[start : start + len(part)], self.teacher.answer(part[:, :-1])


def main() -> None:
    torch.set_num_threads(1)
    result = {name: measure(finished(name, shards)) for name, shards in SHARDS.items()}
    keep("draws", result)


def finished(name: str, shards: int) -> Text:
    job = load_job(JOBS / f"{name}.yaml")
    store = LocalStore(job.storage)
    made = json.loads(store.path(f"runs/{name}/report.json").read_text())["fingerprints"]
    manifest = TokenManifest.load(store, f"data/{made['data']}/manifest.json")
    assert manifest is not None
    tokens = [
        read_tokens(store, f"data/{made['data']}/train", record) for record in manifest.train.records(store, range(shards))
    ]
    (teacher,) = [f for f in store.path("teacher").glob(f"*/{MODEL}") if vocabulary(f) == manifest.vocab_size]
    student = load_model(store.path(f"student/{made['student']}/{MODEL}"), "fp32", torch.device("cpu"))
    ids = torch.from_numpy(np.concatenate([t.ids for t in tokens])).long()
    row_ids = [row_id for t in tokens for row_id in t.row_ids]
    return Text(TransformersBackend(Replica(str(teacher), job.teacher.dtype)), student, ids, row_ids, manifest.vocab_size)


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def kinds(vocab_size: int) -> dict[str, Labels]:
    found: dict[str, Labels] = {}
    for n in SIZES:
        found[f"systematic N={n}"] = SampledLabels(samples=n)
        found[f"multinomial N={n}"] = SampledLabels(samples=n, method="multinomial")
    for k in (12, 50):
        found[f"top-{k} renormalised"] = TopkLabels(kind="topk", k=k, renormalize=True)
        found[f"top-{k} + tail"] = TopkLabels(kind="topk", k=k)
    return found


def measure(text: Text) -> dict[str, Any]:
    labels = kinds(text.vocab_size)
    codecs = {name: label_kind(spec, text.frame) for name, spec in labels.items()}
    parts: dict[str, list[Arrays]] = {name: [] for name in codecs}
    sums = {name: np.zeros(2) for name in codecs}
    positions, entropy, began, teacher_s = 0, 0.0, time.process_time(), 0.0
    for ids, row_ids, answer in text.batches():
        teacher_s += time.process_time() - began
        p = torch.cat(list(answer.logits())).double().softmax(-1)
        entropy -= float(torch.special.xlogy(p, p).sum())
        q = student_probs(text.student, ids)
        for name, codec in codecs.items():
            arrays = codec.extract(answer, row_ids)
            parts[name].append(arrays)
            sums[name] += errors(codec, arrays, p, q)
        positions += len(p)
        began = time.process_time()
    rows = {
        name: {
            "squared_error": float(sums[name][0] / positions),
            "angle_to_full_degrees": round(float(sums[name][1] / positions), 2),
            **storage(codecs[name], labels[name], join(parts[name]), text),
        }
        for name in codecs
    }
    facts = {"vocabulary": text.vocab_size, "positions": positions, "teacher_entropy_nats": round(entropy / positions, 3)}
    return {**facts, "teacher_tokens_per_cpu_s": round(positions / teacher_s, 1), "kinds": rows}


@torch.no_grad()
def student_probs(student: Any, ids: torch.Tensor) -> torch.Tensor:
    return output_head(student)(last_hidden(student, ids[:, :-1]).flatten(0, 1)).double().softmax(-1)


def errors(codec: LabelKind, arrays: Arrays, p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """Sums over positions of |t - p|^2 and of the angle in degrees between the gradients q - t and q - p."""
    soft = codec.targets(arrays, 1.0).map(lambda t: t.flatten(0, 1))
    assert isinstance(soft, Sparse)
    t = torch.zeros_like(p).scatter_add_(1, soft.ids, soft.probs.double())
    gradient = q * t.sum(1, keepdim=True) - t
    if soft.tail is not None:  # the tail is one event: its mass is spread as the student spreads it
        rest = torch.ones_like(q).scatter_(1, soft.ids, 0.0) * q
        spread = rest * (soft.tail.double() / rest.sum(1).clamp_min(1e-12))[:, None]
        t, gradient = t + spread, q - t - spread
    cosine = torch.nn.functional.cosine_similarity(gradient, q - p).clamp(-1, 1)
    return np.array([float((t - p).square().sum()), float(cosine.acos().sum()) * 180 / math.pi])


def storage(codec: LabelKind, labels: Labels, arrays: Arrays, text: Text) -> dict[str, Any]:
    tokens = text.ids[:, 1:].numel()
    columns = codec.pack(arrays)
    facts: dict[str, Any] = {"bytes_per_token": round(compressed(columns) / tokens, 2)}
    if not isinstance(codec, Sampled) or not isinstance(labels, SampledLabels):
        return facts
    packed = {name.partition("@")[0]: values for name, values in columns.items()}
    unique, ids, counts = decode_sets(packed, labels.samples, text.vocab_size, text.frame.seq_len)
    bound = entropy_bound(unique, ids, counts)
    encode_s = best_of(lambda: encode_sets(unique, ids, counts, labels.samples, text.vocab_size))
    decode_s = best_of(lambda: codec.targets(codec.unpack(columns), 1.0))
    return facts | {
        "entropy_bound_bytes": round(sum(bound.values()), 2),
        "unique_ids": round(float(unique.mean()), 2),
        "encode_tokens_per_cpu_s": round(tokens / encode_s),
        "decode_tokens_per_cpu_s": round(tokens / decode_s),
    }


def compressed(columns: Columns) -> int:
    """Bytes of the label columns in a shard's file."""
    data, _ = to_parquet([pa.table({name: pa.array(values, pa.binary()) for name, values in columns.items()})])
    group: Any = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def best_of(work: Any) -> float:
    seconds: list[float] = []
    for _ in range(3):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
