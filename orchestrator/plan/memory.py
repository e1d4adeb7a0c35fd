"""Sizes that can be known from the job file alone: parameters, memory per worker, label bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.batch import Batch
from orchestrator.spec.labels import DenseLabels, Labels, SampledLabels, TopkLabels, Vectors
from orchestrator.spec.model import Model
from orchestrator.spec.train import Train

HEAD_ENTRIES = 1 << 22
"""Logits that the chunked head holds at a time: 16 MiB in fp32."""
GPU_HEAD_ENTRIES = 1 << 27
"""The same on a GPU, whose GEMMs want more rows and whose launches cost more: 512 MiB. Not measured."""
LEAST_HEAD_ROWS = 64
"""Below, the traffic of accumulating the gradient of the head's weight outweighs the GEMM."""
DENSE_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# What transformers takes for keys that are left out; other types take all heads, and hidden_size / heads.
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma3_text": 4}
_HEAD_DIM = {"qwen3": 128, "gemma3_text": 256}


def parameter_count(model: Model, vocab_size: int) -> int | None:
    """Parameters of a dense decoder built from `model`; None for a type or configuration this formula does not know."""
    c: dict[str, Any] = dict(model.config)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if model.type not in DENSE_DECODERS or not all(isinstance(c.get(k), int) for k in needed):
        return None
    if c.get("attention_bias") or c.get("mlp_bias"):
        return None
    d, ffn, layers, heads = (int(c[k]) for k in needed)
    kv_heads = int(c.get("num_key_value_heads", _KV_HEADS.get(model.type)) or heads)
    head_dim = int(c.get("head_dim", _HEAD_DIM.get(model.type)) or d // heads)
    q_norms = 2 * head_dim if model.type in ("qwen3", "gemma3_text") else 0
    attention = 2 * d * heads * head_dim + 2 * d * kv_heads * head_dim + q_norms
    if model.type == "qwen2":
        attention += (heads + 2 * kv_heads) * head_dim
    norms = 4 * d if model.type == "gemma3_text" else 2 * d
    tied = bool(c.get("tie_word_embeddings", model.type == "gemma3_text"))
    return vocab_size * d * (1 if tied else 2) + layers * (attention + 3 * d * ffn + norms) + d


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes one training worker holds, by what for."""

    weights: int
    gradients: int
    optimizer: int
    head: int
    """Logits of one chunk with what the loss makes of them, and the fp32 gradient of the head's weight."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.head


def head_rows(vocab_size: int, on_gpu: bool) -> int:
    """Positions whose logits the chunked head holds at a time."""
    return max(LEAST_HEAD_ROWS, (GPU_HEAD_ENTRIES if on_gpu else HEAD_ENTRIES) // vocab_size)


def worker_memory(params: int, train: Train, seq_len: int, vocab_size: int, width: int) -> WorkerMemory:
    """Model states by ZeRO stage (Rajbhandari et al. 2020), and the chunked head over a model of `width`."""
    stage, workers = train.parallel.stage, train.workers
    size = 2 if train.precision == "bf16" else 4
    master = 4 if train.precision == "bf16" else 0
    return WorkerMemory(
        weights=params * size // (workers if stage >= 3 else 1),
        gradients=params * 4 // (workers if stage >= 2 else 1),
        optimizer=params * (8 + master) // (workers if stage >= 1 else 1),
        head=4
        * vocab_size
        * (3 * min(head_rows(vocab_size, train.gpus_per_worker > 0), Batch.of(train).micro_rows * seq_len) + width),
    )


def label_bytes_per_token(labels: Labels, vocab_size: int, teacher_width: int) -> float:
    """Upper bound of what one position takes before compression."""
    inner = 0.0 if labels.features is None else len(labels.features.keep) * _vector_bytes(labels.features, teacher_width)
    return inner + _distribution_bytes(labels, vocab_size, teacher_width)


def _distribution_bytes(labels: Labels, vocab_size: int, teacher_width: int) -> float:
    if isinstance(labels, SampledLabels):
        return len(labels.temperatures) * (1 + _set_bytes(labels.samples, vocab_size) + labels.samples / 8)
    if isinstance(labels, TopkLabels):
        return _set_bytes(labels.k, vocab_size) + labels.k * 2 + len(labels.temperatures) * 8
    if isinstance(labels, DenseLabels):
        return vocab_size * (2 if labels.dtype == "fp16" else 4)
    return _vector_bytes(labels, teacher_width)


def _vector_bytes(vectors: Vectors, width: int) -> float:
    return width + 4 if vectors.codec == "int8" else 2 * (vectors.rank or width)


def _set_bytes(ids: int, vocab_size: int) -> float:
    """Upper bound of a set of `ids` as Rice codes of its gaps: log2(vocab / ids) bits each, and at most three more."""
    return ids * (math.log2(max(1.0, vocab_size / ids)) + 3) / 8
