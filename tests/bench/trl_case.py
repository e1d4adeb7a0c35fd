"""The case on which a training step is compared: text of the standard library, two small Llamas, labels drawn beforehand.

python trl_case.py FOLDER VOCAB SEQ ROWS        writes tokens.npy, labels.npz, teacher/ and student/
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from labels import merged
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator.labels.sampled import draw

FILES = 400
TEACHER, STUDENT = (512, 12), (256, 6)
"""Hidden size, layers."""
SAMPLES = 50
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build(folder: Path, vocab: int, seq: int, rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = library_texts()
    bpe = trained(texts, vocab)
    ids = np.concatenate([[*encoding.ids, 0] for encoding in bpe.encode_batch(texts)])
    tokens = ids[: rows * seq].astype(np.int32).reshape(rows, seq)
    np.save(folder / "tokens.npy", tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = CHAT
    for seed, (name, shape) in enumerate({"teacher": TEACHER, "student": STUDENT}.items()):
        torch.manual_seed(seed)
        model = llama(vocab, seq, *shape)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "teacher":
            np.savez(folder / "labels.npz", **drawn(model.eval(), torch.from_numpy(tokens).long()))


def library_texts() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted([*root.glob("*.py"), *root.glob("*/*.py")]) if "site-packages" not in f.parts]
    return [f.read_text(errors="replace") for f in files[:FILES]]


def trained(texts: list[str], vocab: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<pad>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return bpe


def llama(vocab: int, seq: int, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=seq,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def drawn(teacher: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Per position the number of ids, then all ids and counts in one piece each, with the start of every row's."""
    columns: dict[str, list[np.ndarray]] = {"n": [], "ids": [], "counts": []}
    for row in tokens:
        logits = teacher(row[None]).logits[0, :-1]
        points = (torch.arange(SAMPLES) + torch.rand(len(logits), 1, dtype=torch.float64)) / SAMPLES
        label = merged(draw(logits, points), logits.shape[-1])
        used = label.probs > 0
        columns["n"].append(used.sum(1).numpy().astype(np.uint8))
        columns["ids"].append(label.ids[used].numpy().astype(np.uint16))
        columns["counts"].append((label.probs[used] * SAMPLES).round().numpy().astype(np.uint8))
    starts = np.cumsum([0, *(len(ids) for ids in columns["ids"])])
    return {"n": np.stack(columns["n"]), "starts": starts, **{k: np.concatenate(columns[k]) for k in ("ids", "counts")}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(Path(sys.argv[1]), *(int(a) for a in sys.argv[2:]))
