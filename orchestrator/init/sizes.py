"""Sizes of a job that fit a corpus and a machine: windows, held-out share, vocabulary, batches and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.pack import HELDOUT_WINDOWS_PER_DOCUMENT
from orchestrator.data.split import heldout_draw, is_heldout
from orchestrator.errors import DataError
from orchestrator.init.text import Length, Sample
from orchestrator.runtime import machine

SEQ_LENS = (256, 128, 64, 32, 16)
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)
ENOUGH = ((256, 32), (64, 8), (8, 2))
"""(training windows, held-out windows) that are tried for, best first."""
PLENTY = 2000
"""Training windows from which on the sizes of the quickstart hold."""
VOCABULARIES = ((1 << 20, 4096), (1 << 18, 2048), (1 << 16, 1024), (0, 512))
"""(bytes of text, ids of a tokenizer that is trained on them)."""
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Machine:
    cores: int
    gpus: int

    @property
    def cores_each(self) -> int:
        """Cores for labelling, and as many for training, which go on side by side."""
        return max(1, self.cores // 2)


@dataclass(frozen=True)
class Windows:
    """The sizes with which a corpus is cut into windows."""

    seq_len: int
    heldout_fraction: float
    train: int
    heldout: int

    @property
    def plenty(self) -> bool:
        return self.train >= PLENTY

    def steps(self, passes: int, least: int, most: int) -> int:
        """Optimizer steps for so many `passes` over the training windows, in tens."""
        return max(least, min(most, passes * self.train // GLOBAL_BATCH // 10 * 10))


QUICKSTART, QUICKSTART_VOCABULARY = Windows(seq_len=256, heldout_fraction=0.05, train=PLENTY, heldout=128), 4096
"""The windows of the standard library, which every machine has."""


def this_machine() -> Machine:
    found = machine.this_machine()
    return Machine(found.cores, len(found.gpus or ()))


def cut(documents: Sequence[Length], longest: int, seed: int = 0) -> Windows:
    """The longest windows, up to `longest` tokens, of which `documents` fill enough, and the share to hold out for that.

    Raises `DataError` for a corpus that is too small for any.
    """
    for train, heldout in ENOUGH:
        for seq_len in (length for length in SEQ_LENS if length <= longest):
            for fraction in FRACTIONS:
                windows = _windows(documents, seq_len, fraction, seed)
                if windows.train >= train and windows.heldout >= heldout:
                    return windows
    tokens = sum(document.tokens for document in documents)
    raise DataError(
        f"{len(documents)} documents of {tokens} tokens in all are too little: some are held out to measure on, and both parts "
        f"must fill windows of {SEQ_LENS[-1]} tokens; give at least 10 documents and a few pages of text"
    )


def _windows(documents: Sequence[Length], seq_len: int, fraction: float, seed: int) -> Windows:
    heldout = [document for document in documents if is_heldout(heldout_draw(document.content, seed), fraction)]
    most = HELDOUT_WINDOWS_PER_DOCUMENT * seq_len
    kept = sum(document.tokens for document in documents) - sum(document.tokens for document in heldout)
    measured = sum(min(document.tokens, most) for document in heldout)
    return Windows(seq_len, fraction, max(0, kept - 1) // seq_len, max(0, measured - 1) // seq_len)


def trained_tokenizer(sample: Sample) -> Any:
    """A tokenizer as the run will train it, of the size that suits the sample and that it yields."""
    from orchestrator.data.tokenizer import train_bpe

    size = sum(len(document.prompt) + len(document.text) for document in sample.documents)
    wanted = next(ids for least, ids in VOCABULARIES if size >= least)
    texts = [(document.prompt + document.text).decode() for document in sample.documents]
    tokenizer = train_bpe(texts, wanted)
    reached = tokenizer.get_vocab_size()
    return tokenizer if reached == wanted else train_bpe(texts, max(300, reached // 50 * 50 - 50))
