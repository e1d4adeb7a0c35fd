"""The principal directions of a teacher's vectors, fitted once per label log and stored beside it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The numpy stubs leave types open.

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from orchestrator.errors import SpecError
from orchestrator.store.label_log import LabelLog

BASIS = "basis"
"""Name under which a label log keeps its bases."""

Floats = npt.NDArray[np.float32]


class Moments:
    """Sums over vectors that come in parts, in float64: all that a principal component analysis needs of them."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        """[width]"""
        self.products = torch.zeros(width, width, dtype=torch.float64)
        """[width, width]"""

    def add(self, vectors: torch.Tensor) -> None:
        """Take in `vectors` [..., width]."""
        wide = vectors.flatten(0, -2).cpu().double()
        self.count += len(wide)
        self.total += wide.sum(0)
        self.products.addmm_(wide.T, wide)


@dataclass(frozen=True)
class Basis:
    """The mean of a set of vectors, and the orthonormal directions in which they vary most."""

    mean: Floats
    """[width]"""
    directions: Floats
    """[rank, width]"""

    @classmethod
    def fit(cls, moments: Moments, rank: int) -> Basis:
        """Principal component analysis; raises `SpecError` for more directions than there can be."""
        if rank > min(moments.count, len(moments.total)):
            raise SpecError(
                f"labels: rank {rank} exceeds the teacher's width {len(moments.total)} or {moments.count} positions"
            )
        mean = moments.total / moments.count
        _, axes = torch.linalg.eigh(moments.products / moments.count - mean[:, None] * mean)
        return cls(mean.float().numpy(), axes.T.flip(0)[:rank].float().contiguous().numpy())

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """Coordinates [..., rank] of `vectors` [..., width]."""
        return (vectors - torch.from_numpy(self.mean)) @ torch.from_numpy(self.directions).T

    def restore(self, coordinates: torch.Tensor) -> torch.Tensor:
        """The nearest vectors [..., width] that the directions hold."""
        return coordinates @ torch.from_numpy(self.directions) + torch.from_numpy(self.mean)


def to_bytes(bases: dict[str, Basis]) -> bytes:
    """`bases` by name as one npz file."""
    sink = io.BytesIO()
    arrays = {f"{name}/{part}": getattr(basis, part) for name, basis in bases.items() for part in ("mean", "directions")}
    np.savez(sink, **arrays)
    return sink.getvalue()


def from_bytes(data: bytes) -> dict[str, Basis]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
        return {name: Basis(arrays[f"{name}/mean"], arrays[f"{name}/directions"]) for name in names}


def bases_of(log: LabelLog) -> Callable[[], dict[str, Basis]]:
    """The bases of `log`, read when first asked for: they are there once the first shard is."""

    @cache
    def read() -> dict[str, Basis]:
        data = log.kept(BASIS)
        assert data is not None
        return from_bytes(data)

    return read
