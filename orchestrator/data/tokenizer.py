"""The tokenizer of a run: trained on the corpus, or the teacher's own. Either way a folder with `tokenizer.json`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.sources import Piece, read_piece
from orchestrator.errors import DataError
from orchestrator.spec.data import Data, TrainTokenizer
from orchestrator.store.files import sha256_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenizerFacts:
    """The properties of a tokenizer folder that packing and the manifest need."""

    sha256: str
    vocab_size: int
    """Number of ids, special ones included."""
    bos: int | None
    """Id that the tokenizer itself puts before a text; None if it puts none."""
    separator: int | None
    """Id between two documents."""


def train_tokenizer(data: Data, spec: TrainTokenizer, pieces: Sequence[Piece], folder: Path) -> None:
    """Train a byte-level BPE on the first `TRAINING_BYTES` of the corpus and save it to `folder`."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_bpe(_sample(data, pieces), spec.vocab_size)
    check_yield(tokenizer, spec)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    wrapped.save_pretrained(folder)


def check_yield(tokenizer: Tokenizer, spec: TrainTokenizer) -> None:
    """Raise `DataError` if the corpus was too small for the vocabulary that `spec` asks for."""
    found = tokenizer.get_vocab_size()
    if found != spec.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size: the corpus yields only {found} entries, not {spec.vocab_size}; set it to {found}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (of `tokenizers`) of `vocab_size` ids, or of as many as `texts` yield."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_facts(folder: Path) -> TokenizerFacts:
    """Facts of the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    first = tokenizer("a").input_ids[0]
    return TokenizerFacts(
        sha256=sha256_of(folder / "tokenizer.json"),
        vocab_size=len(tokenizer),
        bos=first if first == tokenizer.bos_token_id else None,
        separator=tokenizer.eos_token_id,
    )


def special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the text of a special token; nothing where `tokenizer` has none."""
    texts = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(sorted(texts, key=len, reverse=True)) or r"(?!)")


def decode_document(data: Data, name: str, raw: bytes) -> str | None:
    """The text of a document, None if it is to be skipped; raises `DataError` naming the first bad byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.undecodable == "error":
            raise DataError(f"{name}: not UTF-8 at byte {error.start} (data.undecodable: replace | skip)") from error
        return raw.decode("utf-8", errors="replace") if data.undecodable == "replace" else None


def _sample(data: Data, pieces: Sequence[Piece]) -> Iterator[str]:
    documents = itertools.chain.from_iterable(read_piece(data.source, piece) for piece in pieces)
    taken = 0
    for name, raw, prompt in documents:
        text = decode_document(data, name, prompt + raw)
        if text:
            yield text
            taken += len(prompt + raw)
        if taken >= TRAINING_BYTES:
            return
