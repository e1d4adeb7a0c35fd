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


@dataclass(frozen=True)
class Basis:
    """Where vectors are, and the orthonormal directions in which they vary most."""

    mean: Floats
    """[width]"""
    directions: Floats
    """[rank, width]"""

    @classmethod
    def fit(cls, vectors: torch.Tensor, rank: int) -> Basis:
        """Principal component analysis of `vectors` [n, width]; raises `SpecError` for more directions than there can be."""
        if rank > min(vectors.shape):
            raise SpecError(f"labels: rank {rank} exceeds the teacher's width or the calibration, {tuple(vectors.shape)}")
        wide = vectors.double()
        mean = wide.mean(0)
        _, axes = torch.linalg.eigh((wide - mean).T @ (wide - mean))
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
