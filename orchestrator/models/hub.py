"""Checkpoints that exist already, on disk or on the Hugging Face hub; safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.models.tokenizer import TEMPLATES, TOKENIZER_FILES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARD = "README.md"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
    f"{TEMPLATES}/*",
)
"""Patterns of the files of a checkpoint that a run may read, but for its card."""


def checkpoint_folder(path: str, revision: str | None, key: str) -> Path:
    """The folder of the checkpoint `path`, a directory or a hub name; `key` of the job file names it in errors.

    Raises `SpecError` for a directory that is not there or holds no configuration and weights, and `EnvironmentFault` for a
    name that cannot be fetched.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")):
            raise SpecError(f"{key}: {path} is not a directory")
        folder = _fetched(path, revision, key)
    if not (folder / "config.json").is_file():
        raise SpecError(f"{key}: {folder} has no config.json")
    missing = [file.name for file in weight_files(folder) if not file.is_file()]
    if missing:
        raise SpecError(f"{key}: {folder} has no {missing[0]}, which its {INDEX} names")
    if not weight_files(folder):
        raise SpecError(f"{key}: {folder} has no .safetensors weights: neither {WEIGHTS} nor {INDEX}")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of the model in `folder`, as transformers finds them; none where it would find none.

    Others may lie beside them: an older sharding, the original format, an adapter. Raises `SpecError` for an index that cannot
    be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        names: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        return [folder / name for name in sorted(set(names.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{folder / INDEX}: no index of weights: {error}") from error


def ignored_weights(folder: Path) -> list[str]:
    """Names of the .safetensors files in `folder` that hold none of the model's weights."""
    return sorted(file.name for file in {*folder.glob("*.safetensors")} - {*weight_files(folder)})


def weights_and_configuration(folder: Path) -> list[Path]:
    """The files in `folder` that say what model it holds."""
    names = ["config.json", "generation_config.json"] + ([] if (folder / WEIGHTS).is_file() else [INDEX])
    return [*(folder / name for name in names if (folder / name).is_file()), *weight_files(folder)]


def vocab_size_of(folder: Path, key: str) -> int:
    """Ids that the model in `folder` knows; raises `SpecError` if its configuration does not say."""
    config = read_config(folder, key)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise SpecError(f"{key}: {folder}/config.json names no vocab_size")
    return size


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The values of config.json in `folder`; raises `SpecError` if it is no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError) as error:
        raise SpecError(f"{key}: {folder}/config.json: {error}") from error
    if not isinstance(config, dict):
        raise SpecError(f"{key}: {folder}/config.json is no JSON object")
    return config


def _fetched(name: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "generation_config.json", CARD, INDEX, "model*.safetensors", *TOKENIZER_FILES, f"{TEMPLATES}/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise EnvironmentFault(f"{key}: {name} is no local directory and cannot be fetched: {error}") from error
