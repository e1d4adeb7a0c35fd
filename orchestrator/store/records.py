"""The records that stages leave in the storage, each written last: a stage without its record did not happen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.file_record import FileRecord
from orchestrator.store.file_record import describe_folder as describe_folder
from orchestrator.store.files import Store, local_folder
from orchestrator.store.record import Record
from orchestrator.store.shard_pages import ShardPages
from orchestrator.store.shard_pages import ShardRecord as ShardRecord

MANIFEST = "manifest.json"
MODEL = "model"


class TokenManifest(Record):
    """All token shards of one corpus under one tokenizer."""

    fingerprint: str
    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    train: ShardPages
    heldout: ShardPages
    group_rows: int
    """Rows of a row group: what is hashed, fetched and decoded by itself. The last one of a shard may have fewer."""
    documents: int
    heldout_documents: int
    skipped_documents: int
    dropped_tokens: int
    """Tokens that are the target of no window: a piece's end that did not fill one, prompts that fill a whole one."""
    target_share: float = 1.0
    """Share of the training positions that are learnt from; the others are prompts."""
    special_documents: int = 0
    """Documents that contain the text of a special token."""

    @classmethod
    def without_corpus(
        cls,
        seq_len: int,
        vocab_size: int,
        train: ShardPages = ShardPages(),  # noqa: B008 — frozen
        target_share: float = 1.0,
        group_rows: int = 16,
    ) -> TokenManifest:
        """Return the manifest of shards that were not made from documents, such as random ids to measure with."""
        counts = {"documents": 0, "heldout_documents": 0, "skipped_documents": 0, "dropped_tokens": 0}
        return cls(
            fingerprint="",
            seq_len=seq_len,
            vocab_size=vocab_size,
            tokenizer_sha256="",
            train=train,
            heldout=ShardPages(),
            target_share=target_share,
            group_rows=group_rows,
            **counts,
        )

    @property
    def content(self) -> str:
        """Hex identity of the tokens themselves, however they were made."""
        return fingerprint("tokens", self.tokenizer_sha256, self.group_rows, self.train.pages, self.heldout.pages)

    @property
    def rows(self) -> int:
        """Training rows."""
        return int(self.train.rows.sum())

    @property
    def shard_rows(self) -> list[int]:
        return self.train.rows.tolist()

    @property
    def heldout_rows(self) -> list[int]:
        """By shard."""
        return self.heldout.rows.tolist()


@dataclass(frozen=True)
class Tokens:
    """Token shards, and where they lie in the storage."""

    folder: str
    manifest: TokenManifest

    @property
    def rows(self) -> int:
        """Training rows."""
        return self.manifest.rows

    @property
    def tokenizer(self) -> str:
        return f"{self.folder}/tokenizer"


class ModelManifest(Record):
    """A Hugging Face model folder in the storage."""

    fingerprint: str
    files: dict[str, FileRecord]
    vocab_size: int
    training: dict[str, float] = Field(default_factory=dict[str, float])
    """Figures of the run that made it, by name with unit."""

    @property
    def content(self) -> str:
        """Hex identity of weights, configuration and tokenizer."""
        return fingerprint("model", {name: record.sha256 for name, record in self.files.items()})


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face model folder that every node can open, and what is in it."""

    address: str
    manifest: ModelManifest

    @property
    def path(self) -> Path:
        """The folder on this node; other nodes are told the address."""
        return local_folder(self.address)


def finished_model(store: Store, stage_key: str) -> ModelFolder | None:
    """The model that a finished stage left behind; None if there is none, or not any more what its manifest says."""
    manifest, key = ModelManifest.load(store, f"{stage_key}/{MANIFEST}"), f"{stage_key}/{MODEL}"
    if manifest is None or store.contents(key) != manifest.files:
        return None
    return ModelFolder(store.address(key), manifest)


def finish_model(store: Store, stage_key: str, vocab_size: int, training: dict[str, float]) -> ModelFolder:
    """Write the manifest of the complete folder `stage_key`/model: from now on the stage is done."""
    key = f"{stage_key}/{MODEL}"
    files = store.contents(key)
    assert files is not None
    manifest = ModelManifest(fingerprint=stage_key.rpartition("/")[2], files=files, vocab_size=vocab_size, training=training)
    manifest.save(store, f"{stage_key}/{MANIFEST}")
    return ModelFolder(store.address(key), manifest)
