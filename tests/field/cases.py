"""Small models and corpora that real users' reports are acted out on, made from the standard library's own text."""

from __future__ import annotations

import json
import random
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import Json

VOCAB = 512
END = "<|endoftext|>"
LLAMA: Json = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPE = {key: value for key, value in LLAMA.items() if not key.endswith("token_id")}
STUDENT: Json = {"kind": "config", "model": {"type": "llama", "config": SHAPE | {"num_hidden_layers": 1}}}
GPT2: Json = {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}


def texts(count: int = 220, size: int = 700) -> list[str]:
    """`count` pieces of real source text, always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted([*root.glob("json/*.py"), *root.glob("email/*.py"), *root.glob("http/*.py")])
    text = "".join(file.read_text() for file in files)
    pieces = [text[start : start + size] for start in range(0, len(text) - size, size)]
    random.Random(0).shuffle(pieces)
    return pieces[:count]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCAB` ids whose begin and end of text are `END`, id 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END, "<s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts(300), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END).save_pretrained(folder)


def save_model(folder: Path, kind: str = "llama", config: Json | None = None, seed: int = 0) -> Path:
    """A freshly drawn causal LM of transformers' type `kind`, with its tokenizer."""
    torch.manual_seed(seed)
    built = AutoConfig.for_model(kind, vocab_size=VOCAB, **(config or LLAMA))
    AutoModelForCausalLM.from_config(built).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite model.safetensors in `folder`."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def stray_shard(folder: Path) -> Path:
    """A model with an older shard of noise beside its weights."""
    save_model(folder)
    draw = torch.Generator().manual_seed(1)
    noise = {
        name: torch.randn(value.shape, generator=draw) * 0.5 for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(noise, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    return folder


def junk(folder: Path) -> Path:
    """A model folder as it is downloaded: original weights and an optimizer's state lie beside it."""
    save_model(folder)
    (folder / "original").mkdir()
    for name in ("original/consolidated.00.pth", "optimizer.pt"):
        (folder / name).write_bytes(random.Random(0).randbytes(1 << 20))
    return folder


def unprefixed_gpt2(folder: Path) -> Path:
    """GPT-2 as the hub stores it: names without `transformer.`, no head."""
    save_model(folder, "gpt2", GPT2 | {"n_positions": 128})
    change_weights(
        folder, lambda w: {name.removeprefix("transformer."): value for name, value in w.items() if name != "lm_head.weight"}
    )
    return folder


def huge_row(folder: Path) -> Path:
    """A broken teacher whose values are all finite."""
    save_model(folder)

    def blown_up(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.embed_tokens.weight"][300] *= 1e30
        return weights

    change_weights(folder, blown_up)
    return folder


def added_tokens(folder: Path) -> Path:
    """A model whose tokenizer gives ids beyond its embedding."""
    save_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    return folder


def short_positions(folder: Path) -> Path:
    """GPT-2 with 32 learned positions."""
    return save_model(folder, "gpt2", GPT2 | {"n_positions": 32})


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """`rows` as JSON lines; a string stands for a row with that `text`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
    return file


def null_text(file: Path) -> Path:
    return write_jsonl(file, [{"text": None if i == 50 else text} for i, text in enumerate(texts(160))])


def one_document(file: Path) -> Path:
    return write_jsonl(file, ["".join(texts(100))])


def control_token(file: Path) -> Path:
    return write_jsonl(file, [text[:300] + END + text[300:] for text in texts(160)])


def field_job(root: Path, name: str, teacher: Path, corpus: Path, **sections: Any) -> Json:
    """A job of seconds on `corpus` with the local `teacher`, its storage under `root`."""
    return {
        "name": name,
        "storage": str(root / "stores" / name),
        "data": {
            "source": {"kind": "jsonl", "paths": [str(corpus)]},
            "tokenizer": {"kind": "teacher"},
            "seq_len": 64,
            "rows_per_shard": 16,
            "heldout_fraction": 0.15,
        },
        "teacher": {"kind": "transformers", "path": str(teacher), "dtype": "fp32"},
        "labels": {"kind": "sampled"},
        "student": STUDENT,
        "objective": {"alpha": 0.1},
        "train": {"steps": 12, "global_batch": 8, "micro_batch": 4, "precision": "fp32", "checkpoint_every": 5},
        "evaluate": {"rows": 64, "baseline": False},
        "tracking": {"enabled": False},
    } | sections
