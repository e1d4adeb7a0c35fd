"""Reading of a checkpoint's JSON files; no model library needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import SpecError
from orchestrator.spec.model import Model

Json = dict[str, Any]

POSITION_TABLES: dict[str, tuple[str, int]] = {
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "openai-gpt": ("n_positions", 512),
    "gptj": ("n_positions", 2048),
    "codegen": ("n_positions", 2048),
    "ctrl": ("n_positions", 256),
    "gpt_neo": ("max_position_embeddings", 2048),
    "opt": ("max_position_embeddings", 2048),
    "biogpt": ("max_position_embeddings", 1024),
    "xlm": ("max_position_embeddings", 512),
}
"""Decoders of transformers that look positions up in a table: the configuration value that is its length, and its default.
Rotary models compute theirs, so for them such a value is advice."""


def local_checkpoint(path: str) -> Path | None:
    """The directory that `path` names; None if it is a name on the hub."""
    folder = Path(path).expanduser().absolute()
    return folder if folder.is_dir() or path.startswith((".", "/", "~")) else None


def read_object(file: Path, key: str) -> Json:
    """The JSON object in `file`; raises `SpecError` naming `key` if there is none."""
    try:
        value = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise SpecError(f"{key}: {file}: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{key}: {file} is no JSON object")
    return cast(Json, value)


def model_in(path: str, key: str) -> Model | None:
    """Return the model that config.json of a local checkpoint describes; None for a checkpoint that is not on this machine."""
    folder = local_checkpoint(path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json", key)
    text = cast(Json, config.get("text_config") or {})
    return Model(type=str(config.get("model_type")), config={k: v for k, v in (text | config).items() if k != "model_type"})


def positions(kind: str, config: Mapping[str, Any]) -> int | None:
    """The most positions that a model can tell apart; None if it computes them."""
    if kind not in POSITION_TABLES:
        return None
    name, default = POSITION_TABLES[kind]
    given = config.get(name, config.get("max_position_embeddings"))
    return given if isinstance(given, int) else default


def check_positions(kind: str, config: Mapping[str, Any], seq_len: int, key: str) -> None:
    """Raise `SpecError` if windows of `seq_len` are longer than the table of positions of the model that `key` names."""
    most = positions(kind, config)
    if most is not None and most < seq_len:
        raise SpecError(
            f"data.seq_len: {seq_len}, but {key} ({kind}) has {most} positions ({POSITION_TABLES[kind][0]}); "
            f"set data.seq_len to {most} or less"
        )


def vocab_size(model: Model) -> int | None:
    """Ids that `model` knows, where its configuration says it."""
    size = model.config.get("vocab_size")
    return size if isinstance(size, int) else None


def layers(model: Model) -> int | None:
    """Blocks of `model`, where its configuration says it."""
    found = next((model.config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in model.config), None)
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class Token:
    """An entry of tokenizer.json that stands beside the vocabulary proper."""

    id: int
    content: str
    special: bool


def added_tokens(folder: Path, key: str) -> list[Token]:
    """Tokens that were added to the tokenizer in `folder`."""
    added = cast(list[Json], read_object(folder / "tokenizer.json", key).get("added_tokens") or [])
    return [Token(int(t["id"]), str(t["content"]), bool(t.get("special"))) for t in added]
