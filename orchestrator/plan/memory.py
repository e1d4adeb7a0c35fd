"""Rows of the chunked head, and bytes of labels."""

from __future__ import annotations

import math

from orchestrator.spec.labels import DenseLabels, Labels, SampledLabels, TopkLabels, Vectors

HEAD_ENTRIES = 1 << 22
"""Logits that the chunked head holds at a time: 16 MiB in fp32."""
GPU_HEAD_ENTRIES = 1 << 27
"""The same on a GPU, whose GEMMs want more rows and whose launches cost more: 512 MiB. Not measured."""
LEAST_HEAD_ROWS = 64
"""Below, the traffic of accumulating the gradient of the head's weight outweighs the GEMM."""


def head_rows(vocab_size: int, on_gpu: bool) -> int:
    """Positions whose logits the chunked head holds at a time."""
    return max(LEAST_HEAD_ROWS, (GPU_HEAD_ENTRIES if on_gpu else HEAD_ENTRIES) // vocab_size)


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
    if vectors.codec == "int8":
        return width + 4
    return 4 * width if vectors.codec == "fp32" else 2 * (vectors.rank or width)


def _set_bytes(ids: int, vocab_size: int) -> float:
    """Upper bound of a set of `ids` as Rice codes of its gaps: log2(vocab / ids) bits each, and at most three more."""
    return ids * (math.log2(max(1.0, vocab_size / ids)) + 3) / 8
