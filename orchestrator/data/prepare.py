"""The data stage: Ray Data reads and tokenizes the pieces of a corpus and writes its token shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.data.pack import PackedPiece, pack_piece
from orchestrator.data.sample import read_sample, too_small
from orchestrator.data.sources import Piece, corpus_listing, list_pieces
from orchestrator.data.tokenizer import TokenizerFacts, tokenizer_facts, train_tokenizer
from orchestrator.errors import DataError
from orchestrator.models.tokenizer import copy_tokenizer
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.runtime.environment import limit_threads
from orchestrator.runtime.session import quiet_ray_data
from orchestrator.spec.data import Data, TrainTokenizer
from orchestrator.store.files import Store, local_folder
from orchestrator.store.records import MANIFEST, TokenManifest
from orchestrator.store.shards import TOKEN_SCHEMA_VERSION


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
    pieces = list_pieces(corpus.data)
    if not pieces:
        raise DataError("data.source: the corpus is empty")
    facts: TokenizerFacts = ray.get(_tokenizer_task.remote(store, corpus, pieces))
    packed = _pack_all(store, corpus, pieces, facts)
    manifest = token_manifest(corpus.key, corpus.data, facts, packed)
    if not manifest.train or not manifest.heldout:
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
    tokens = manifest.dropped_tokens + data.seq_len * sum(record.rows for record in (*manifest.train, *manifest.heldout))
    return too_small(data, sample.about(data.seed, sample.size / tokens))


def token_manifest(key: str, data: Data, facts: TokenizerFacts, packed: list[PackedPiece]) -> TokenManifest:
    """What the pieces of a corpus add up to."""
    rows = sum(record.rows for piece in packed for record in piece.train)
    return TokenManifest(
        fingerprint=key,
        seq_len=data.seq_len,
        vocab_size=facts.vocab_size,
        tokenizer_sha256=facts.sha256,
        train=tuple(record for piece in packed for record in piece.train),
        heldout=tuple(record for piece in packed for record in piece.heldout),
        documents=sum(p.documents for p in packed),
        heldout_documents=sum(p.heldout_documents for p in packed),
        skipped_documents=sum(p.skipped_documents for p in packed),
        dropped_tokens=sum(p.dropped_tokens for p in packed),
        special_documents=sum(p.special_documents for p in packed),
        target_share=sum(p.targets for p in packed) / max(1, rows * data.seq_len),
    )


def _pack_all(store: Store, corpus: Corpus, pieces: list[Piece], facts: TokenizerFacts) -> list[PackedPiece]:
    import ray.data

    def pack(row: dict[str, Any]) -> dict[str, Any]:
        limit_threads(1)
        packed = pack_piece(store, corpus.folder, corpus.data, pieces[row["piece"]], facts)
        return {"piece": row["piece"], "packed": packed.model_dump_json()}

    quiet_ray_data()
    items = [{"piece": piece.index} for piece in pieces]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(pack, num_cpus=1).take_all()
    return [PackedPiece.model_validate_json(r["packed"]) for r in sorted(rows, key=lambda r: r["piece"])]


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
