"""The files of a tokenizer: which they are, and a copy that stays the same tokenizer whatever model lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.records import FileRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""All that transformers looks for beside a model to make its tokenizer of."""
TEMPLATES = "additional_chat_templates"
"""Folder of chat templates that have a name."""

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is, in every version of transformers."""
PLAIN_CLASSES = (None, PLAIN_CLASS, "TokenizersBackend")
PROBE = "The 1st of two lines: naïve café,\n\tif x == 42:  # 東京\n"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that are its tokenizer's."""
    named = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [*named, *sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja"))]


def tokenizer_identity(files: Mapping[str, FileRecord]) -> str:
    """Hex identity of the tokenizer among the `files` of a model folder: of all that can change ids or how they are used."""
    own = {name: record.sha256 for name, record in files.items() if name in TOKENIZER_FILES or name.startswith(f"{TEMPLATES}/")}
    return fingerprint("tokenizer", own)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Bring the tokenizer in `source`, and nothing else, into `folder`.

    The copy names its class and its special tokens. Where they are left out, transformers takes those of the type of the model
    in the same folder, and a student's type may not be its teacher's. A class that makes other ids than tokenizer.json says,
    which is what texts are tokenized with, is replaced.
    """
    from transformers import AutoTokenizer

    for name in tokenizer_files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    settings = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).is_file() else {}
    settings = {name: getattr(loaded, name) for name in SPECIAL} | settings
    if settings.get("tokenizer_class") in PLAIN_CLASSES or not is_plain(loaded, folder):
        settings["tokenizer_class"] = PLAIN_CLASS
    write_json(folder / SETTINGS, settings)


def is_plain(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Return whether `tokenizer` produces the same ids as tokenizer.json in `folder`, judged by a probe text."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(folder / TOKENIZER))
    return tokenizer.encode(PROBE, add_special_tokens=False) == plain.encode(PROBE, add_special_tokens=False).ids


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write `value` as transformers writes its settings."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
