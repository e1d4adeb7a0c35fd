"""What a teacher is to the rest: ids in, logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import torch

from orchestrator.models.build import load_model


class Teacher(Protocol):
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[rows, seq, vocab] for `ids` [rows, seq]: position t predicts ids[t + 1]."""
        ...


class TransformersBackend:
    """A causal LM of transformers in this process."""

    def __init__(self, folder: Path, dtype: Literal["bf16", "fp32"]) -> None:
        self._model = load_model(folder, dtype)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids.to(self._model.device), use_cache=False).logits
