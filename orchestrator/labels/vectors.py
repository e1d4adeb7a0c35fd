"""Vectors per position, such as hidden states, in few bytes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import torch

from orchestrator.errors import DataError
from orchestrator.labels.layout import Arrays, Frame
from orchestrator.labels.packing import VECTOR_DTYPES, VectorsPacking
from orchestrator.spec import labels as spec

INT8_LIMIT = 127
FP32_LIMIT = torch.finfo(torch.float32).max
LIMITS = {"fp16": 65504.0, "fp32": FP32_LIMIT, "int8": FP32_LIMIT, "pca": 65504.0}
"""Largest magnitude that the entries of a vector may have, by codec."""


class Vectors(VectorsPacking):
    """A named array of vectors [rows, seq, width]; int8 adds `name`_scale, pca keeps coordinates instead."""

    def __init__(self, name: str, storage: spec.Vectors, frame: Frame) -> None:
        super().__init__(name, storage, frame.shape)
        self._codec = storage.codec
        self._frame = frame

    def extract(self, vectors: torch.Tensor) -> Arrays:
        """Raises `DataError` for what is no number or beyond the codec."""
        vectors = vectors.float().cpu()
        if self._codec == "pca":
            vectors = self._frame.basis(self._name).project(vectors)
        most = float(vectors.abs().amax())
        if not most <= LIMITS[self._codec]:
            raise DataError(f"the teacher's {self._name} reach {most:g}, beyond what {self._codec} holds")
        if self._codec != "int8":
            return {self._name: vectors.numpy().astype(VECTOR_DTYPES[self._codec])}
        scale = vectors.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / INT8_LIMIT
        return {self._name: (vectors / scale).round().numpy().astype("i1"), self._scale: scale[..., 0].numpy()}

    def tensor(self, arrays: Arrays) -> torch.Tensor:
        """The vectors [rows, seq, width]: fp16 where they are stored so, as several steps of them wait in memory; else fp32."""
        values = torch.from_numpy(arrays[self._name])
        if self._codec == "pca":
            return self._frame.basis(self._name).restore(values.float())
        return values * torch.from_numpy(arrays[self._scale])[..., None] if self._codec == "int8" else values
