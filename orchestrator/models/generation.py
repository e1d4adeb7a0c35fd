"""Files that make a saved model able to generate: a tokenizer, its special ids in both configurations, sampling settings.

The ids are the tokenizer's, as transformers' own `Trainer` aligns them: what a configuration class has by default, or a
checkpoint had, would make a model that never stops.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import IntegrityError
from orchestrator.models.tokenizer import SETTINGS, TOKENIZER, copy_tokenizer, is_plain, write_json

Json = dict[str, Any]

CONFIG, GENERATION = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
OF_ITS_OWN_MODEL = (
    "_from_model_config",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "transformers_version",
)
"""Generation settings that are about the model they were written for, not about how text is drawn."""


def complete_folder(folder: Path, tokenizer: Path, seq_len: int, settings: Json | None = None) -> None:
    """Make the causal LM saved in `folder` one that works by itself with the tokenizer in the folder `tokenizer`.

    It was trained on windows of `seq_len` targets. `settings` are the generation settings of its teacher, as
    generation_config.json has them; without any, those that the model was saved with stay. May be repeated.
    """
    copy_tokenizer(tokenizer, folder)
    ids = _tokenizer_ids(folder)
    config = read_json(folder / CONFIG)
    config.pop("auto_map", None)  # names files of code that do not come along
    for part in (config, config.get("text_config")):
        if part is not None:
            part |= ids | {"use_cache": True}
            if "max_position_embeddings" in part:
                part["max_position_embeddings"] = max(part["max_position_embeddings"], seq_len)
    write_json(folder / CONFIG, config)
    vocab_size, positions = _sizes(folder)
    own = settings or read_json(folder / GENERATION)
    write_json(folder / GENERATION, _fitting(own, ids, vocab_size, positions))
    if positions is not None:
        write_json(folder / SETTINGS, read_json(folder / SETTINGS) | {"model_max_length": positions})


def check_folder(folder: Path) -> None:
    """Raise `IntegrityError` if the model in `folder` and the tokenizer beside it do not belong together."""
    from transformers import AutoTokenizer

    ids, (vocab_size, positions) = _tokenizer_ids(folder), _sizes(folder)
    generation = read_json(folder / GENERATION)
    right = {CONFIG: ids, GENERATION: _fitting(generation, ids, vocab_size, positions)}
    for file, found in ((CONFIG, read_json(folder / CONFIG)), (GENERATION, generation)):
        for name, own in ids.items():
            if own is not None and own >= vocab_size:
                raise IntegrityError(f"{folder}: {name} is {own}, but the model knows {vocab_size} ids only")
            if found.get(name) != right[file][name]:
                raise IntegrityError(f"{folder}/{file}: {name} is {found.get(name)}, by the tokenizer {right[file][name]}")
    if not is_plain(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder):
        raise IntegrityError(f"{folder}/{SETTINGS}: with this class transformers makes other ids than {TOKENIZER} says")


def read_json(file: Path) -> Json:
    """The settings in `file`; empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _fitting(settings: Json, ids: dict[str, int | None], vocab_size: int, positions: int | None) -> Json:
    """Return the generation `settings` that hold for a model with these special `ids`; its own end of text is added."""
    fitting = {name: value for name, value in settings.items() if name not in OF_ITS_OWN_MODEL}
    if positions is not None and fitting.get("max_length") is not None:
        fitting["max_length"] = min(fitting["max_length"], positions)
    ends = [ids["eos_token_id"], *_listed(settings.get("eos_token_id"))]
    ends = [end for end in dict.fromkeys(ends) if end is not None and end < vocab_size]
    return fitting | ids | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None, "use_cache": True}


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _tokenizer_ids(folder: Path) -> dict[str, int | None]:
    """The special ids of the tokenizer in `folder`, by what configurations call them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return {name: getattr(tokenizer, name) for name in IDS}


def _sizes(folder: Path) -> tuple[int, int | None]:
    """Return the vocabulary size of the model in `folder`, and its maximum number of positions, None if it names no limit."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
    return config.vocab_size, getattr(config, "max_position_embeddings", None)
