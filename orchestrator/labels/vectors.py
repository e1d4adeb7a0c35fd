"""Vectors per position, such as hidden states, in few bytes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from orchestrator.errors import DataError
from orchestrator.labels.layout import Arrays, Columns, pack, unpack

VectorCodec = Literal["fp16", "int8"]
INT8_LIMIT = 127
FP16_LIMIT = 65504.0


class Vectors:
    """A named array of vectors [rows, seq, width]; int8 adds `name`_scale, one fp32 per position."""

    def __init__(self, name: str, codec: VectorCodec, seq_len: int) -> None:
        self._name, self._scale = name, f"{name}_scale"
        self._codec: VectorCodec = codec
        self._seq_len = seq_len

    def extract(self, vectors: torch.Tensor) -> Arrays:
        vectors = vectors.float().cpu()
        most = float(vectors.abs().amax())
        if not most <= (FP16_LIMIT if self._codec == "fp16" else torch.finfo(torch.float32).max):
            raise DataError(f"the teacher's {self._name} reach {most:g}, beyond what {self._codec} holds")
        if self._codec == "fp16":
            return {self._name: vectors.numpy().astype("<f2")}
        scale = vectors.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / INT8_LIMIT
        return {self._name: (vectors / scale).round().numpy().astype("i1"), self._scale: scale[..., 0].numpy()}

    def pack(self, arrays: Arrays) -> Columns:
        if self._codec == "fp16":
            return {self._name: pack(arrays[self._name], "<f2")}
        return {self._name: pack(arrays[self._name], "i1"), self._scale: pack(arrays[self._scale], "<f4")}

    def unpack(self, columns: Columns) -> Arrays:
        if self._codec == "fp16":
            return {self._name: unpack(columns[self._name], "<f2", self._seq_len, -1)}
        return {
            self._name: unpack(columns[self._name], "i1", self._seq_len, -1),
            self._scale: unpack(columns[self._scale], "<f4", self._seq_len),
        }

    def tensor(self, arrays: Arrays) -> torch.Tensor:
        """The vectors [rows, seq, width], fp32."""
        values = torch.from_numpy(arrays[self._name].astype(np.float32))
        return values if self._codec == "fp16" else values * torch.from_numpy(arrays[self._scale])[..., None]
