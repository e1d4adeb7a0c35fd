"""The records that stages leave in the storage, each written last: a stage without its record did not happen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import IntegrityError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.files import Store, local_folder, sha256_of

MANIFEST = "manifest.json"
MODEL = "model"


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    def save(self, store: Store, key: str) -> None:
        """Write this record under `key`, durably."""
        store.replace(key, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, store: Store, key: str) -> Self | None:
        """The record under `key`, None if there is none; raises `IntegrityError` if it cannot be read."""
        try:
            return cls.model_validate_json(store.read(key))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise IntegrityError(f"{store.address(key)}: not a valid record: {error.errors()[0]['msg']}") from error


class FileRecord(Record):
    """A file by content."""

    sha256: str
    bytes: int


class ShardRecord(FileRecord):
    """A committed shard: where it lies in its stage's folder, and what it holds."""

    file: str
    rows: int


class TokenManifest(Record):
    """All token shards of one corpus under one tokenizer."""

    fingerprint: str
    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    train: tuple[ShardRecord, ...]
    heldout: tuple[ShardRecord, ...]
    documents: int
    heldout_documents: int
    skipped_documents: int
    dropped_tokens: int
    """Tokens that are the target of no window: a piece's end that did not fill one, prompts that fill a whole one."""
    target_share: float = 1.0
    """Of the training positions, those that are learnt from; the others are prompts."""
    special_documents: int = 0
    """Documents that contain the text of a special token."""

    @classmethod
    def without_corpus(
        cls, seq_len: int, vocab_size: int, train: Iterable[ShardRecord] = (), target_share: float = 1.0
    ) -> TokenManifest:
        """Of shards that were not made from documents, such as random ids to measure with."""
        counts = {"documents": 0, "heldout_documents": 0, "skipped_documents": 0, "dropped_tokens": 0}
        return cls(
            fingerprint="",
            seq_len=seq_len,
            vocab_size=vocab_size,
            tokenizer_sha256="",
            train=tuple(train),
            heldout=(),
            target_share=target_share,
            **counts,
        )

    @property
    def content(self) -> str:
        """Hex identity of the tokens themselves, however they were made."""
        return fingerprint("tokens", self.tokenizer_sha256, [s.sha256 for s in self.train], [s.sha256 for s in self.heldout])

    @property
    def shard_rows(self) -> list[int]:
        return [s.rows for s in self.train]

    @property
    def heldout_rows(self) -> list[int]:
        """By shard."""
        return [s.rows for s in self.heldout]


@dataclass(frozen=True)
class Tokens:
    """Token shards, and where they lie in the storage."""

    folder: str
    manifest: TokenManifest

    @property
    def rows(self) -> int:
        """Training rows."""
        return sum(self.manifest.shard_rows)

    @property
    def tokenizer(self) -> str:
        return f"{self.folder}/tokenizer"


class ModelManifest(Record):
    """A Hugging Face model folder in the storage."""

    fingerprint: str
    files: dict[str, FileRecord]
    vocab_size: int
    training: dict[str, float] = {}
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


def describe_folder(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Size and hash of the files of `folder` (or of those called `names`), by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if names is None else [folder / n for n in sorted(names)]
    return {str(p.relative_to(folder)): FileRecord(sha256=sha256_of(p), bytes=p.stat().st_size) for p in files}


def describe_rest(folder: Path, described: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Size and hash of the files of `folder` that are not `described` yet, by relative name."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return describe_folder(folder, names - described.keys())


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
