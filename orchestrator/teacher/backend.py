"""What a teacher is to the rest: ids in, an answer out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import torch

from orchestrator.labels.answer import Answer
from orchestrator.models.build import device, load_model
from orchestrator.models.features import captured, feature_widths
from orchestrator.models.head import check_head, last_hidden, output_head


class Teacher(Protocol):
    def answer(self, ids: torch.Tensor) -> Answer:
        """What it says about `ids` [rows, seq]: position t is about ids[t + 1]."""
        ...


class TransformersBackend:
    """A causal LM of transformers in this process."""

    def __init__(self, folder: Path, dtype: Literal["bf16", "fp32"], features: tuple[str, ...] = (), gpus: float = 0) -> None:
        self._model = load_model(folder, dtype, device(gpus))
        check_head(self._model, "teacher")
        feature_widths(self._model, features, "labels.features")
        self._features = features
        self._head = output_head(self._model)

    @torch.inference_mode()
    def answer(self, ids: torch.Tensor) -> Answer:
        with captured(self._model, self._features, "labels.features") as found:
            hidden = last_hidden(self._model, ids.to(self._model.device))
        return Answer(hidden, self._head, len(self._head.weight), found)
