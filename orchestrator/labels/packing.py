"""Labels as bytes and back, without torch: what stands between the arrays that are kept of an answer and a row group."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The numpy stubs leave types open.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from orchestrator.labels.layout import Arrays, Columns, Shape, pack, tempered, unpack
from orchestrator.labels.setcode import COLUMNS, ID_COLUMNS, decode_ids, decode_sets, encode_ids, encode_sets
from orchestrator.spec import labels as spec

DTYPES = {"fp16": "<f2", "fp32": "<f4"}
VECTOR_DTYPES = {"fp16": "<f2", "fp32": "<f4", "int8": "i1", "pca": "<f2"}


class Packing(Protocol):
    def pack(self, arrays: Arrays) -> Columns:
        """The rows of a row group as bytes."""
        ...

    def unpack(self, columns: Columns) -> Arrays:
        """Return the arrays that `pack` was given; raises `ValueError` for bytes that it never produces."""
        ...


class SampledPacking:
    """`ids` [rows, seq, samples] of every temperature, as the columns of `setcode`."""

    def __init__(self, labels: spec.SampledLabels, shape: Shape) -> None:
        self._labels, self._shape = labels, shape

    def pack(self, arrays: Arrays) -> Columns:
        columns: Columns = {}
        for t in self._labels.temperatures:
            drawn = arrays[tempered("ids", t)]
            new = np.ones(drawn.shape, dtype=bool)
            new[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
            starts = np.flatnonzero(new)
            counts = np.diff(np.append(starts, drawn.size))
            ids = drawn.reshape(-1)[starts]
            packed = encode_sets(new.sum(-1), ids, counts, self._labels.samples, self._shape.vocab_size)
            columns |= {tempered(name, t): values for name, values in packed.items()}
        return columns

    def unpack(self, columns: Columns) -> Arrays:
        arrays: Arrays = {}
        for t in self._labels.temperatures:
            packed = {name: columns[tempered(name, t)] for name in COLUMNS}
            _, ids, counts = decode_sets(packed, self._labels.samples, self._shape.vocab_size, self._shape.seq_len)
            shape = (len(packed["sets"]), self._shape.seq_len, self._labels.samples)
            arrays[tempered("ids", t)] = np.repeat(ids, counts).astype(np.int32).reshape(shape)
        return arrays


class TopkPacking:
    """The id columns of `setcode`, `logprobs`, and the numbers per position."""

    def __init__(self, labels: spec.TopkLabels, shape: Shape) -> None:
        self._k, self._shape = labels.k, shape
        self._of_position = [tempered(name, t) for t in labels.temperatures for name in ("log_z", "tail")]
        """Names of the arrays with one number per position."""

    def pack(self, arrays: Arrays) -> Columns:
        ids = arrays["ids"]
        columns = encode_ids(np.full(ids.shape[:2], self._k), ids.reshape(-1), self._shape.vocab_size)
        columns["logprobs"] = pack(arrays["logprobs"], "<f2")
        return columns | {name: pack(arrays[name], "<f4") for name in self._of_position}

    def unpack(self, columns: Columns) -> Arrays:
        seq = self._shape.seq_len
        unique, ids = decode_ids({name: columns[name] for name in ID_COLUMNS}, self._shape.vocab_size, seq)
        if np.any(unique != self._k):
            raise ValueError(f"packed sets: a position has not {self._k} ids")
        arrays: Arrays = {name: unpack(columns[name], "<f4", seq) for name in self._of_position}
        arrays["ids"] = ids.astype(np.int32).reshape(-1, seq, self._k)
        arrays["logprobs"] = unpack(columns["logprobs"], "<f2", seq, self._k)
        return arrays


class DensePacking:
    """`logits` [rows, seq, vocab]."""

    def __init__(self, labels: spec.DenseLabels, shape: Shape) -> None:
        self._dtype, self._shape = DTYPES[labels.dtype], shape

    def pack(self, arrays: Arrays) -> Columns:
        return {"logits": pack(arrays["logits"], self._dtype)}

    def unpack(self, columns: Columns) -> Arrays:
        return {"logits": unpack(columns["logits"], self._dtype, self._shape.seq_len, self._shape.vocab_size)}


class VectorsPacking:
    """A named array of vectors [rows, seq, width] or of their coordinates; int8 adds `name`_scale."""

    def __init__(self, name: str, storage: spec.Vectors, shape: Shape) -> None:
        self._name, self._scale = name, f"{name}_scale"
        self._dtype, self._is_int8, self._seq = VECTOR_DTYPES[storage.codec], storage.codec == "int8", shape.seq_len

    def pack(self, arrays: Arrays) -> Columns:
        columns = {self._name: pack(arrays[self._name], self._dtype)}
        return columns | {self._scale: pack(arrays[self._scale], "<f4")} if self._is_int8 else columns

    def unpack(self, columns: Columns) -> Arrays:
        arrays = {self._name: unpack(columns[self._name], self._dtype, self._seq, -1)}
        return arrays | {self._scale: unpack(columns[self._scale], "<f4", self._seq)} if self._is_int8 else arrays


class HiddenPacking(VectorsPacking):
    """`states` [rows, seq, width], stored like any vectors."""

    def __init__(self, labels: spec.HiddenLabels, shape: Shape) -> None:
        super().__init__("states", labels, shape)


PACKINGS: dict[str, Callable[[Any, Shape], Packing]] = {
    "sampled": SampledPacking,
    "topk": TopkPacking,
    "dense": DensePacking,
    "hidden": HiddenPacking,
}


class Unpacking:
    """Reads what `Codec.pack` writes, for processes that do without torch."""

    def __init__(self, labels: spec.Labels, shape: Shape) -> None:
        kept = labels.features
        self._parts = [PACKINGS[labels.kind](labels, shape)]
        self._parts += [VectorsPacking(f.name, kept, shape) for f in kept.keep] if kept else []

    def unpack(self, columns: Columns) -> Arrays:
        """The arrays of a row group; raises `ValueError` for bytes that no `pack` gives."""
        arrays: Arrays = {}
        for part in self._parts:
            arrays |= part.unpack(columns)
        return arrays
