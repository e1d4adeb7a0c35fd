"""Location of a model's tensors in the files of its folder, under names that transformers resolves as it loads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from orchestrator.models.hub import weight_files


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    """In that file."""
    shape: tuple[int, ...]
    as_it_is: bool
    """True if it is the model's own tensor, not one of several from which transformers builds it."""

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt", backend="pread") as weights:
            return weights.get_tensor(self.name)


def stored_tensors(folder: Path, model: PreTrainedModel) -> dict[str, Stored]:
    """By the name that it has in `model`, an outline of that in `folder`: each tensor in the files of its weights.

    Checkpoints of a base model lack its prefix (GPT-2 on the hub), old ones have names that the class has given up.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 — not a dict
                renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
                if renamed not in known and name in known:
                    renamed, converted = name, None
                found[renamed] = Stored(file, name, tuple(weights.get_slice(name).get_shape()), converted is None)
    return found
