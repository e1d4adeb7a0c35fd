"""The source of the text, and how it becomes training windows."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.base import Spec

Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class StdlibSource(Spec):
    """The source files of the Python standard library: real text that every user has."""

    kind: Literal["stdlib"] = "stdlib"
    prompt: ClassVar[None] = None


class TextSource(Spec):
    """UTF-8 text files, one document a file."""

    kind: Literal["text"]
    prompt: ClassVar[None] = None
    paths: Paths
    """Files or globs (`**` allowed)."""


class Rows(Spec):
    """A source whose documents have columns."""

    prompt: str | None = None
    """Column (in JSON, field) of a text that goes before the document: context only, its tokens are no targets."""


class JsonlSource(Rows):
    """JSON lines, one document a line."""

    kind: Literal["jsonl"]
    paths: Paths
    field: str = "text"


class ParquetSource(Rows):
    """Parquet files, one document a row."""

    kind: Literal["parquet"]
    paths: Paths
    column: str = "text"


class DatasetSource(Rows):
    """A `datasets` name, or a folder that `datasets.load_dataset` or `load_from_disk` understands."""

    kind: Literal["dataset"]
    name: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None


Source = Annotated[StdlibSource | TextSource | JsonlSource | ParquetSource | DatasetSource, Field(discriminator="kind")]


class TrainTokenizer(Spec):
    """Train a byte-level BPE on the corpus itself; for teachers that are trained from scratch."""

    kind: Literal["train"] = "train"
    vocab_size: int = Field(default=4096, ge=300, le=1_000_000)


class TeacherTokenizer(Spec):
    """The teacher's own tokenizer; the only sound choice for a teacher that already exists."""

    kind: Literal["teacher"]


Tokenizer = Annotated[TrainTokenizer | TeacherTokenizer, Field(discriminator="kind")]


class Data(Spec):
    source: Source = StdlibSource()
    tokenizer: Tokenizer = TrainTokenizer()
    seq_len: int = Field(default=256, ge=8, le=1_048_576)
    """Positions with a target in one training window; a row holds seq_len + 1 ids."""
    rows_per_shard: int | None = Field(default=None, ge=1, le=1_000_000)
    """At most so many rows are written, labelled and committed together. Without a number, 64 for a small corpus and more for a
    large one, up to about 20 million tokens. The labels of so many rows pass through a teacher's memory at once: give a number
    where a large corpus gets labels of kind dense or hidden."""
    rows_per_group: int = Field(default=16, ge=1, le=4096)
    """Rows of a row group: a part of a shard that is packed, hashed, fetched and decoded by itself."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents kept out of training for evaluation."""
    undecodable: Literal["error", "replace", "skip"] = "error"
    """Treatment of a document that is not UTF-8."""
    special_tokens_in_text: Literal["encode_as_text", "allow", "error"] = "encode_as_text"
    """Treatment of a document that itself contains the text of a special token, such as <|endoftext|>. allow: it becomes that
    token, which texts that contain a chat template need."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the held-out split and the shuffle into shards; the job's seed does not touch the tokens."""
