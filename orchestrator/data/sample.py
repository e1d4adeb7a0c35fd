"""The first documents of a corpus, read before a run starts: whether they can be used, and whether there is enough of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.sources import Document, Piece, list_pieces, read_piece
from orchestrator.data.split import Sized, heldout_draw, remedy, split
from orchestrator.data.tokenizer import check_yield, decode_document, train_bpe
from orchestrator.errors import DataError, SpecError
from orchestrator.spec.data import Data, DatasetSource, ParquetSource, Source, TrainTokenizer

SAMPLE_BYTES = 16 << 20
"""Text that is read; the whole corpus where it is smaller."""
BYTES_PER_TOKEN = 4.0
"""Bytes per token are about this for English and for code."""


@dataclass(frozen=True)
class Sample:
    """The first documents of a corpus."""

    documents: tuple[tuple[int, Document], ...]
    """With the piece that each belongs to."""
    size: int
    """Bytes of text in the whole corpus, an estimate unless the sample is `whole`."""
    whole: bool

    @property
    def texts(self) -> list[bytes]:
        return [document.prompt + document.text for _, document in self.documents]

    def rows(self, seq_len: int) -> int:
        """About how many windows the corpus makes."""
        return max(1, int(self.size / BYTES_PER_TOKEN / seq_len))

    def sized(self, seed: int, tokens: Sequence[float]) -> list[Sized]:
        """The documents as far as the split goes; `tokens` are those of each."""
        return [
            Sized(piece, heldout_draw(hashlib.sha256(text).hexdigest(), seed), count)
            for (piece, _), text, count in zip(self.documents, self.texts, tokens, strict=True)
        ]

    def about(self, seed: int, bytes_per_token: float) -> list[Sized]:
        return self.sized(seed, [len(text) / bytes_per_token for text in self.texts])


def read_sample(data: Data, most: int = SAMPLE_BYTES) -> Sample | None:
    """The first documents of the corpus, `most` bytes or a little more; None for a data set that would have to be fetched.

    Raises `DataError` naming the file and row that cannot be used.
    """
    if isinstance(data.source, DatasetSource) and not Path(data.source.name).is_dir():
        return None
    pieces = list_pieces(data)
    documents: list[tuple[int, Document]] = []
    size = 0
    for piece in pieces:
        for document in read_piece(data.source, piece):
            if decode_document(data, document.name, document.prompt) is None or not decode_document(data, *document[:2]):
                continue  # as the data stage does
            documents.append((piece.index, document))
            size += len(document.prompt) + len(document.text)
            if size >= most:
                there = _corpus_bytes(data.source, pieces, size / len(documents))
                return Sample(tuple(documents), max(size, there), whole=False)
    if not documents:
        raise DataError("data.source: the corpus is empty")
    return Sample(tuple(documents), size, whole=True)


def _corpus_bytes(source: Source, pieces: Sequence[Piece], mean: float) -> int:
    """About how much text there is, from the sizes of files, or from rows of `mean` bytes."""
    if isinstance(source, ParquetSource | DatasetSource):
        return int(mean * sum(piece.last - piece.first for piece in pieces))
    return sum(Path(path).stat().st_size for path in {path for piece in pieces for path, _ in piece.files})


def count_tokens(data: Data, sample: Sample, tokenizer: Path | None) -> list[int]:
    """Return the tokens of each document, by the tokenizer in folder `tokenizer` or the one that the data stage will train.

    Raises `DataError` for a corpus too small for the vocabulary, and `SpecError` for a tokenizer that cannot be read.
    """
    from tokenizers import Tokenizer

    texts = [text.decode(errors="replace") for text in sample.texts]
    if tokenizer is not None:
        try:
            made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        except Exception as error:  # tokenizers has no class of its own for what it cannot read
            raise SpecError(f"teacher.path: {tokenizer}/tokenizer.json cannot be read: {error}") from error
        made.no_truncation()
        made.no_padding()
    else:
        assert isinstance(data.tokenizer, TrainTokenizer)
        made = train_bpe(texts, data.tokenizer.vocab_size)
        check_yield(made, data.tokenizer)
    return [len(encoded) for encoded in made.encode_batch(texts, add_special_tokens=False)]


def too_small(data: Data, documents: Sequence[Sized]) -> DataError:
    """The error for a corpus of `documents` that does not fill a window on both sides, with a way out."""
    found = split(documents, data.heldout_fraction, data.seq_len)
    if len(documents) == 1:
        return DataError(f"data.source: the corpus is one document, and {remedy(documents, data)}")
    return DataError(
        f"data.heldout_fraction: {data.heldout_fraction:g} keeps {found.heldout_documents} of {len(documents)} documents for "
        f"evaluation; both sides must fill one window of {data.seq_len} tokens: {remedy(documents, data)}"
    )
