"""What every label kind decodes to, and the byte layout that kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.errors import DataError

Columns = dict[str, list[bytes]]
"""One bytes value per row, by column."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SparseTargets:
    """A distribution per position on k of the vocabulary's ids; unused places hold id 0 with probability 0."""

    ids: torch.Tensor
    """[rows, seq, k], int64"""
    probs: torch.Tensor
    """[rows, seq, k], fp32"""
    tail: torch.Tensor | None
    """[rows, seq], fp32: mass of all other ids; None where the k ids are a complete, unbiased draw."""


def finite(logits: torch.Tensor) -> None:
    """Raise `DataError` if the teacher said something that is no number. `logits`: [rows, seq, vocab]."""
    # The sum of a row is non-finite if any entry is; inf - inf is NaN, so nothing can hide.
    bad = ~torch.isfinite(logits.sum(dim=(1, 2), dtype=torch.float32))
    if bool(bad.any()):
        raise DataError(
            f"teacher logits are not finite in {int(bad.sum())} of {len(bad)} rows, first: row {int(bad.nonzero()[0])}"
        )


def id_width(vocab_size: int) -> int:
    """Bytes that an id takes on storage."""
    return 2 if vocab_size <= 1 << 16 else 3 if vocab_size <= 1 << 24 else 4


def pack_ids(ids: npt.NDArray[Any], width: int) -> bytes:
    """`ids` as little-endian integers of `width` bytes."""
    raw = np.ascontiguousarray(ids, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return raw[:, :width].tobytes()


def unpack_ids(blobs: Sequence[bytes], width: int) -> Ids:
    """The ids of several rows, one after another."""
    raw = np.frombuffer(b"".join(blobs), dtype=np.uint8).reshape(-1, width)
    out = np.zeros((len(raw), 4), dtype=np.uint8)
    out[:, :width] = raw
    return out.view("<u4").reshape(-1).astype(np.int64)


def column(name: str, temperature: float) -> str:
    """Name of a column that belongs to one temperature."""
    return f"{name}@{temperature:g}"
