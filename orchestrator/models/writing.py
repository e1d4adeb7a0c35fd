"""A causal LM written to a folder file by file, by a process that never holds more of it than one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from orchestrator.models.hub import INDEX, WEIGHTS

FILE_BYTES = 1 << 30
"""A larger file is begun only for a tensor that is larger by itself."""

Tensors = dict[str, torch.Tensor]


class ModelWriter:
    """Writes what `PreTrainedModel.save_pretrained` would, from tensors that come one after another.

    `add` them in the order of the model's state, each once; `finish` makes the folder one that can be loaded. `model` gives
    names and configuration, its own parameters are not looked at.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, dtype: torch.dtype, file_bytes: int = FILE_BYTES) -> None:
        self._model, self._folder, self._dtype, self._limit = model, folder, dtype, file_bytes
        self._by_block = _merges(model)
        self._block: Tensors = {}
        self._file: Tensors = {}
        self._names: list[list[str]] = []
        """The tensors of each file that is written."""
        self._bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in the parameter or buffer `name` of the model, whole and on the CPU."""
        if name in (getattr(self._model, "_keys_to_ignore_on_save", None) or ()):
            return
        if self._block and not (self._by_block and _block(name) == _block(next(iter(self._block)))):
            self._take_block()
        self._block[name] = tensor

    def finish(self) -> None:
        """Write what is left, the configuration, and the index if there are several files."""
        self._take_block()
        self._write_file()
        count = len(self._names)
        files = (
            [WEIGHTS] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        )
        for number, file in enumerate(files):
            self._written(number).rename(self._folder / file)
        if count > 1:
            index = {
                "metadata": {"total_parameters": self._model.num_parameters(), "total_size": self._bytes},
                "weight_map": {name: file for file, names in zip(files, self._names, strict=True) for name in names},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        config: Any = self._model.config
        config.dtype, config.architectures = self._dtype, [type(self._model).__name__]
        config.save_pretrained(self._folder)
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(self._folder)

    def _take_block(self) -> None:
        """Move the tensors of a block to the file, under the names that they have on disk."""
        for name, tensor in revert_weight_conversion(self._model, self._block).items():
            if self._file and _bytes(self._file) + tensor.nbytes > self._limit:
                self._write_file()
            self._file[name] = tensor.contiguous()
        self._block = {}

    def _write_file(self) -> None:
        save_file(self._file, self._written(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._file))
        self._bytes += _bytes(self._file)
        self._file = {}

    def _written(self, number: int) -> Path:
        """Return the temporary path of file number `number`, used until it is known how many files there are."""
        return self._folder / f"model-{number}.part"


def _merges(model: PreTrainedModel) -> bool:
    """Return whether several of the model's tensors become one on disk, so that they must be present together."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return any(len(converter.reverse_transform().source_patterns) > 1 for converter in converters)


def _block(name: str) -> str:
    """The name of the block that the tensor `name` belongs to: all up to the first number."""
    parts = name.split(".")
    return ".".join(parts[: next((place for place, part in enumerate(parts) if part.isdigit()), len(parts)) + 1])


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
