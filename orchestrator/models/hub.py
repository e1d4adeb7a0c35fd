"""Checkpoints that exist already, on disk or on the Hugging Face hub; safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentFault, SpecError


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
    if not any(folder.glob("*.safetensors")):
        raise SpecError(f"{key}: {folder} has no .safetensors weights")
    return folder


def weights_and_configuration(folder: Path) -> list[Path]:
    """The files in `folder` that say what model it holds."""
    present = (folder / name for name in ("config.json", "generation_config.json", "model.safetensors.index.json"))
    return [*(file for file in present if file.is_file()), *sorted(folder.glob("*.safetensors"))]


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

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except Exception as error:
        raise EnvironmentFault(f"{key}: {name} is no local directory and cannot be fetched: {error}") from error
