"""Dense soft labels: log-probabilities of the whole vocabulary at temperature 1, from which any other follows."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import numpy as np
import torch

from orchestrator.labels.answer import Answer
from orchestrator.labels.layout import Arrays, Frame
from orchestrator.labels.packing import DensePacking
from orchestrator.labels.targets import Dense
from orchestrator.spec.labels import DenseLabels


class DenseKind(DensePacking):
    def __init__(self, spec: DenseLabels, frame: Frame) -> None:
        super().__init__(spec, frame.shape)

    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """`logits` [rows, seq, vocab]. As log-probabilities the likely ids lie near zero, where fp16 is finest."""
        parts = [logits.log_softmax(-1).cpu().numpy().astype(self._dtype) for logits in answer.logits()]
        return {"logits": np.concatenate(parts).reshape(*answer.states.shape[:2], -1)}

    def targets(self, arrays: Arrays, temperature: float) -> Dense:
        """Log-probabilities [rows, seq, vocab] at temperature 1, good for any."""
        return Dense(torch.tensor(arrays["logits"]))
