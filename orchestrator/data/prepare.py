"""The data stage: Ray Data reads and tokenizes the pieces of a corpus and writes its token shards."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.data.pack import PackedPiece, pack_piece, piece_key
from orchestrator.data.sample import read_sample, too_small
from orchestrator.data.sizing import group_rows, shard_rows
from orchestrator.data.sources import Piece, corpus_bytes, corpus_listing, list_pieces
from orchestrator.data.tokenizer import TokenizerFacts, tokenizer_facts, train_tokenizer
from orchestrator.errors import DataError
from orchestrator.models.tokenizer import copy_tokenizer
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.runtime.environment import limit_threads
from orchestrator.runtime.session import quiet_ray_data
from orchestrator.spec.data import Data, TrainTokenizer
from orchestrator.store.files import Store, local_folder
from orchestrator.store.records import MANIFEST, TokenManifest
from orchestrator.store.shard_pages import PageWriter
from orchestrator.store.shards import TOKEN_SCHEMA_VERSION

MOST_TASKS = 10_000
"""Tasks that pack; of a very large corpus each does several pieces, one after another."""
READERS, PIECES_AT_A_TIME = 16, 1024
_COUNTS = ("documents", "heldout_documents", "skipped_documents", "dropped_tokens", "special_documents")


@dataclass(frozen=True)
class Corpus:
    """A corpus to tokenize, identified."""

    key: str
    data: Data
    teacher_tokenizer: str | None
    """Address of a folder with the tokenizer to use; None to train one."""

    @property
    def folder(self) -> str:
        return f"data/{self.key}"


def identify_corpus(data: Data, teacher_tokenizer: str | None, tokenizer_identity: str) -> Corpus:
    """Name the token shards that `data` will become; raises `DataError` if there is nothing to read."""
    key = fingerprint("data", TOKEN_SCHEMA_VERSION, data, corpus_listing(data.source), tokenizer_identity)
    return Corpus(key, data, teacher_tokenizer)


def prepared_tokens(store: Store, corpus: Corpus) -> TokenManifest | None:
    """The manifest of a corpus that is already tokenized."""
    return TokenManifest.load(store, f"{corpus.folder}/{MANIFEST}")


def prepare_tokens(store: Store, corpus: Corpus) -> TokenManifest:
    """Tokenize `corpus`; raises `DataError` for a corpus that does not fill one training and one held-out window."""
    size = corpus_bytes(corpus.data.source)
    data = corpus.data.model_copy(update={"rows_per_shard": shard_rows(corpus.data, size)})
    pieces = list_pieces(data)
    if not pieces:
        raise DataError("data.source: the corpus is empty")
    facts: TokenizerFacts = ray.get(_tokenizer_task.remote(store, corpus, pieces))
    _pack_all(store, corpus.folder, data, pieces, facts)
    manifest = token_manifest(store, corpus, facts, packed_pieces(store, corpus.folder, len(pieces)))
    if not len(manifest.train) or not len(manifest.heldout):
        raise _too_small(corpus.data, manifest)
    manifest.save(store, f"{corpus.folder}/{MANIFEST}")
    return manifest


def _too_small(data: Data, manifest: TokenManifest) -> DataError:
    """The error for a corpus that does not fill a window on both sides, by what its documents turned out to hold."""
    sample = read_sample(data)
    if sample is None or not sample.whole:
        return DataError(
            f"data.heldout_fraction: {data.heldout_fraction:g} keeps {manifest.heldout_documents} documents for evaluation and "
            f"{manifest.documents} for training; both must fill one window of {data.seq_len} tokens"
        )
    tokens = manifest.dropped_tokens + data.seq_len * (manifest.rows + sum(manifest.heldout_rows))
    return too_small(data, sample.about(data.seed, sample.size / tokens))


def token_manifest(store: Store, corpus: Corpus, facts: TokenizerFacts, packed: Iterable[PackedPiece]) -> TokenManifest:
    """Return the manifest that sums up the packed pieces of a corpus, and store the pages with the records of their shards."""
    train, heldout = PageWriter(store, f"{corpus.folder}/train"), PageWriter(store, f"{corpus.folder}/heldout")
    counts, targets = Counter[str](), 0
    for piece in packed:
        train.add(piece.train)
        heldout.add(piece.heldout)
        targets += piece.targets
        counts.update({name: getattr(piece, name) for name in _COUNTS})
    pages = train.close()
    return TokenManifest(
        fingerprint=corpus.key,
        seq_len=corpus.data.seq_len,
        vocab_size=facts.vocab_size,
        tokenizer_sha256=facts.sha256,
        train=pages,
        heldout=heldout.close(),
        group_rows=group_rows(corpus.data),
        target_share=targets / max(1, int(pages.rows.sum()) * corpus.data.seq_len),
        **{name: counts[name] for name in _COUNTS},
    )


def packed_pieces(store: Store, folder: str, count: int) -> Iterator[PackedPiece]:
    """Yield the records of the `count` packed pieces in order, reading a few at a time."""

    def read(piece: int) -> PackedPiece:
        packed = PackedPiece.load(store, piece_key(folder, piece))
        assert packed is not None
        return packed

    with ThreadPoolExecutor(READERS) as readers:
        for first in range(0, count, PIECES_AT_A_TIME):
            yield from readers.map(read, range(first, min(count, first + PIECES_AT_A_TIME)))


def _pack_all(store: Store, folder: str, data: Data, pieces: list[Piece], facts: TokenizerFacts) -> None:
    import ray.data

    def pack(row: dict[str, Any]) -> dict[str, Any]:
        limit_threads(1)
        piece: Piece = pickle.loads(row["piece"])
        pack_piece(store, folder, data, piece, facts)
        return {"piece": piece.index}

    quiet_ray_data()
    items = [{"piece": pickle.dumps(piece)} for piece in pieces]  # in the rows, and not with the function to every process
    ray.data.from_items(items, override_num_blocks=min(len(items), MOST_TASKS)).map(pack, num_cpus=1).materialize()


@ray.remote(num_cpus=1)
def _tokenizer_task(store: Store, corpus: Corpus, pieces: list[Piece]) -> TokenizerFacts:
    key = f"{corpus.folder}/tokenizer"
    if not store.exists(key):
        with store.folder_for(key) as folder:
            if corpus.teacher_tokenizer is not None:
                copy_tokenizer(local_folder(corpus.teacher_tokenizer), folder)
            else:
                assert isinstance(corpus.data.tokenizer, TrainTokenizer)
                train_tokenizer(corpus.data, corpus.data.tokenizer, pieces, folder)
    return tokenizer_facts(store.local(key))
