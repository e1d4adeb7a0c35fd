"""A look at an own teacher, and a student of a sensible size for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.models.hub import read_config
from orchestrator.plan.sizes import DENSE_DECODERS, Decoder, decoder

PRUNABLE = DENSE_DECODERS
"""Types that `student.kind: pruned` makes smaller; `models.prune` knows what their blocks are made of."""
WIDTH_STEP = 64
MANY = 50_000_000
"""Parameters from which on a teacher is slow on CPU cores."""


@dataclass(frozen=True)
class TeacherFolder:
    """An existing causal language model."""

    path: str
    """As the job file names it."""
    type: str
    config: dict[str, Any]
    tokenizer: Path
    """Its tokenizer.json."""

    @property
    def shape(self) -> Decoder | None:
        return decoder(self.type, self.config)

    @property
    def positions(self) -> int | None:
        """The longest text it can read, in tokens, if its configuration says."""
        said = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        return said if isinstance(said, int) else None

    @property
    def vocab_size(self) -> int | None:
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def large(self) -> bool:
        return self.shape is None or self.shape.total >= MANY


def teacher_found(path: str) -> TeacherFolder:
    """The model in the folder `path`, or of the hub name `path`, of which only configuration and tokenizer are fetched.

    Raises `SpecError` for a folder that lacks either, and `EnvironmentFault` for a name that cannot be fetched.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _from_hub(path)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise SpecError(
                f"--teacher: {path} has no {name}; a teacher is a folder with config.json, tokenizer.json, *.safetensors"
            )
    config = read_config(folder, "--teacher")
    config = config.get("text_config", config)
    return TeacherFolder(path, str(config.get("model_type")), config, folder / "tokenizer.json")


def pruned_student(teacher: TeacherFolder) -> dict[str, int] | None:
    """Half of the blocks and of the feed-forward channels of `teacher`; None for an architecture that cannot be pruned."""
    if teacher.type not in PRUNABLE or teacher.shape is None:
        return None
    return {
        "layers": _half(teacher.config["num_hidden_layers"]),
        "intermediate_size": _half(teacher.config["intermediate_size"]),
    }


def small_student(teacher: TeacherFolder) -> dict[str, Any]:
    """Type and configuration of a new model half as wide and half as deep as `teacher`, of its family where that is known."""
    shape = teacher.shape
    width = shape.width if shape else teacher.config.get("hidden_size") or teacher.config.get("n_embd") or 256
    blocks = len(shape.blocks) if shape else teacher.config.get("num_hidden_layers") or teacher.config.get("n_layer") or 4
    heads = 4 if width < 1024 else 8
    size = max(8, width // 2 // heads // 2 * 2) * heads  # an even width per head, which rotary embeddings turn in pairs
    config = {
        "hidden_size": size,
        "intermediate_size": 3 * size,
        "num_hidden_layers": _half(blocks),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
    }
    own = teacher.type in PRUNABLE
    return {"type": teacher.type if own else "llama", "config": config | ({"head_dim": size // heads} if own else {})}


def share(student: Decoder | None, teacher: Decoder | None) -> str:
    """Return the size of `student` relative to `teacher`, in words."""
    return f"{size(student)} of {size(teacher)} parameters" if student and teacher else ""


def size(model: Decoder) -> str:
    """Parameters of `model` to two digits."""
    for unit, word in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if model.total >= unit:
            return f"{float(f'{model.total / unit:.2g}'):g}{word}"
    return str(model.total)


def _half(count: int) -> int:
    """Half of `count`, a multiple of `WIDTH_STEP` where it is that large, at least 1."""
    half = max(1, count // 2)
    return half // WIDTH_STEP * WIDTH_STEP if half >= WIDTH_STEP else half


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        files = [Path(hf_hub_download(name, file)) for file in ("config.json", "tokenizer.json")]
    except HFValidationError:
        raise SpecError(
            f"--teacher: {name} is neither a folder here nor a name of the Hugging Face hub (OWNER/MODEL)"
        ) from None
    except Exception as error:
        raise EnvironmentFault(
            f"--teacher: {name} is no folder here and cannot be fetched: {json.dumps(str(error))}"
        ) from error
    return files[0].parent
