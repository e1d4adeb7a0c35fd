"""Code shared by the label kinds: the two forms that labels take between a teacher's answer and a loss's targets.

Arrays are what is kept of an answer, rows first; columns are those arrays as bytes, one value per row, as a shard stores
them. A row group is packed and unpacked as a whole, so that what its rows have in common is stored once.

Nothing here, nor in `labels/packing.py`, needs torch: labels are unpacked in processes that start at once.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The numpy stubs leave types open.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from orchestrator.labels.basis import Basis

Arrays = dict[str, npt.NDArray[Any]]
"""By name, [rows, ...]."""
Columns = dict[str, list[bytes]]
"""One bytes value per row, by column."""


class Shape(NamedTuple):
    """The dimensions needed to pack and unpack labels."""

    vocab_size: int
    seq_len: int
    """Positions of a row."""


@dataclass(frozen=True)
class Frame:
    """The information a label kind needs in addition to its own section of the job file."""

    vocab_size: int
    seq_len: int
    """Positions of a row."""
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The teacher's head, [n, width] to logits [n, vocab]; for reading the kinds that leave it to the reader."""
    bases: Callable[[], dict[str, Basis]] = dict
    """The bases of this log by name, for vectors that are stored by coordinates; asked for when first needed."""

    @property
    def shape(self) -> Shape:
        return Shape(self.vocab_size, self.seq_len)

    def basis(self, name: str) -> Basis:
        return self.bases()[name]


def tempered(name: str, temperature: float) -> str:
    """Name of an array or a column that belongs to one temperature."""
    return f"{name}@{temperature:g}"


def pack(values: npt.NDArray[Any], dtype: str) -> list[bytes]:
    """`values` [rows, ...] in a little-endian numpy dtype, one bytes value per row."""
    return [row.astype(dtype).tobytes() for row in values]


def unpack(rows: Sequence[bytes], dtype: str, *shape: int) -> npt.NDArray[Any]:
    """The values of several rows, [rows, *shape]; one of `shape` may be -1."""
    return np.frombuffer(bytearray(b"".join(rows)), dtype=dtype).reshape(len(rows), *shape)


def rows_of(arrays: Arrays, rows: slice) -> Arrays:
    """Some rows of all arrays."""
    return {name: values[rows] for name, values in arrays.items()}


def join(parts: Sequence[Arrays]) -> Arrays:
    """Arrays of several answers as those of all their rows."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
