"""Dense soft labels: log-probabilities of the whole vocabulary at temperature 1, from which any other follows."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import numpy as np
import torch

from orchestrator.labels.answer import Answer
from orchestrator.labels.layout import Arrays, Columns, Frame, pack, unpack
from orchestrator.labels.targets import Dense
from orchestrator.spec.labels import DenseLabels

DTYPES = {"fp16": "<f2", "fp32": "<f4"}


class DenseKind:
    def __init__(self, spec: DenseLabels, frame: Frame) -> None:
        self._dtype = DTYPES[spec.dtype]
        self._frame = frame

    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """`logits` [rows, seq, vocab]. As log-probabilities the likely ids lie near zero, where fp16 is finest."""
        parts = [logits.log_softmax(-1).cpu().numpy().astype(self._dtype) for logits in answer.logits()]
        return {"logits": np.concatenate(parts).reshape(*answer.states.shape[:2], -1)}

    def pack(self, arrays: Arrays) -> Columns:
        return {"logits": pack(arrays["logits"], self._dtype)}

    def unpack(self, columns: Columns) -> Arrays:
        return {"logits": unpack(columns["logits"], self._dtype, self._frame.seq_len, self._frame.vocab_size)}

    def targets(self, arrays: Arrays, temperature: float) -> Dense:
        """Log-probabilities [rows, seq, vocab] at temperature 1, good for any."""
        return Dense(torch.tensor(arrays["logits"]))
