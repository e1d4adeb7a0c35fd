"""A look at the text that a user has: which files or columns of it are read, and how long its documents are."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.data.sources import Document, list_pieces, read_piece
from orchestrator.errors import DataError, SpecError
from orchestrator.spec.data import Data, JsonlSource, ParquetSource, Source, StdlibSource, TextSource

PROSE = (".md", ".markdown", ".txt", ".rst", ".adoc", ".org", ".tex")
"""Files that are taken from a folder; if it has none of these, all files of text are."""
PROMPTS = ("prompt", "question", "instruction", "query", "input")
RESPONSES = ("response", "answer", "output", "completion", "text", "content")
CHATS = ("messages", "conversations", "conversation")
SAMPLE_BYTES, SAMPLE_DOCUMENTS = 4 << 20, 32
"""Minimum amounts of a corpus, in bytes and documents, that are read to size a job; any larger corpus has plenty of text."""


@dataclass(frozen=True)
class Found:
    """A source as a job file names it, and what to tell the user of it."""

    source: Source
    about: str
    """The corpus in a few words."""
    notes: tuple[str, ...] = ()


class Length(NamedTuple):
    """A document of the sample, in tokens."""

    content: str
    """Hex SHA-256, which decides whether it is held out."""
    tokens: int
    targets: int
    """Tokens that are learnt: all but the prompt's."""


@dataclass(frozen=True)
class Sample:
    """The first documents of a corpus."""

    documents: tuple[Document, ...]
    undecodable: int
    """Documents beside these that are not UTF-8."""


def standard_library() -> Found:
    return Found(StdlibSource(), "the source of Python's standard library")


def text_found(path: str) -> Found:
    """The text files that `path` names, a folder, a file or a glob; raises `SpecError` or `DataError` if there are none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        files = _matches(path)
        return Found(TextSource(kind="text", paths=(path,)), f"{len(files)} files of {path}")
    by_suffix = Counter(file.suffix for file in map(Path, _matches(f"{glob.escape(path)}/**")))
    taken = [suffix for suffix in by_suffix if suffix.lower() in PROSE] or [
        suffix for suffix in by_suffix if suffix and _is_text(_matches(f"{glob.escape(path)}/**/*{suffix}"))
    ]
    if not taken:
        raise DataError(f"--text: {path} holds no text files; name them by a glob, as in --text '{path}/**/*.txt'")
    left_out = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in by_suffix.items() if suffix not in taken)
    paths = tuple(f"{glob.escape(path.rstrip('/'))}/**/*{suffix}" for suffix in sorted(taken))
    about = f"{sum(by_suffix[suffix] for suffix in taken)} files in {path} ({', '.join(sorted(taken))})"
    return Found(TextSource(kind="text", paths=paths), about, (f"left out in {path}: {left_out}",) if left_out else ())


def rows_found(path: str, prompt: str | None, response: str | None) -> Found:
    """The columns of the rows in `path`, a .jsonl or .parquet file; those not given are guessed from their names.

    Raises `SpecError` for a file of another kind, and `DataError` if no column can be learnt.
    """
    file = Path(_matches(path)[0])
    if file.suffix not in (".jsonl", ".parquet"):
        raise SpecError(f"--rows: {path} is neither .jsonl nor .parquet; for plain text use --text")
    row = _first_json(file) if file.suffix == ".jsonl" else _first_row(file)
    texts = [name for name, value in row.items() if isinstance(value, str)]
    for option, name in (("--prompt", prompt), ("--response", response)):
        if name is not None and name not in texts:
            raise SpecError(f"{option}: {path} has no text column {name!r}, there are {', '.join(texts) or 'none'}")
    learnt = response or next((name for name in RESPONSES if name in texts and name != prompt), None)
    if learnt is None:
        raise DataError(_no_response(path, row, texts))
    before = prompt or next((name for name in PROMPTS if name in texts and name != learnt), None)
    guessed = [
        f"{option} {name}"
        for option, given, name in (("--prompt", prompt, before), ("--response", response, learnt))
        if name and not given
    ]
    others = [name for name in texts if name not in (before, learnt)]
    notes = [f"guessed from the column names: {', '.join(guessed)}"] if guessed else []
    notes += [f"not read: {', '.join(others)}"] if others else []
    what = f"{path}: {learnt} is learnt" + (f" after {before}" if before else "")
    source = (
        JsonlSource(kind="jsonl", paths=(path,), field=learnt, prompt=before)
        if file.suffix == ".jsonl"
        else ParquetSource(kind="parquet", paths=(path,), column=learnt, prompt=before)
    )
    return Found(source, what, tuple(notes))


def read_sample(source: Source) -> Sample:
    """Documents from the start of `source`; raises `DataError` for what cannot be read."""
    pieces = list_pieces(Data(source=source))
    documents: list[Document] = []
    taken = undecodable = 0
    for document in itertools.chain.from_iterable(read_piece(source, piece) for piece in pieces):
        if taken >= SAMPLE_BYTES and len(documents) >= SAMPLE_DOCUMENTS:
            break
        taken += len(document.prompt) + len(document.text)
        if _decodes(document.prompt + document.text):
            documents.append(document)
        else:
            undecodable += 1
    return Sample(tuple(documents), undecodable)


def lengths(tokenizer: Any, documents: Sequence[Document]) -> list[Length]:
    """Return the number of ids that `tokenizer` (of `tokenizers`) makes of each of `documents`, including the separator."""
    prompts = tokenizer.encode_batch([document.prompt.decode() for document in documents], add_special_tokens=False)
    texts = tokenizer.encode_batch([document.text.decode() for document in documents], add_special_tokens=False)
    return [
        Length(
            hashlib.sha256(document.prompt + document.text).hexdigest(),
            len(prompt.ids) + len(text.ids) + 1,
            len(text.ids) + 1,
        )
        for document, prompt, text in zip(documents, prompts, texts, strict=True)
    ]


def _matches(pattern: str) -> list[str]:
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207 — takes absolute patterns
    files = sorted(path for path in found if Path(path).is_file())
    if not files:
        raise SpecError(f"{pattern}: no file there")
    return files


def _is_text(files: Sequence[str]) -> bool:
    """Return whether the first few of `files` begin with valid UTF-8 and contain no NUL."""
    for path in files[:20]:
        with Path(path).open("rb") as file:
            start = file.read(4096)
        if b"\0" in start or not _decodes(start[:-3] if len(start) == 4096 else start):
            return False
    return True


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _first_json(file: Path) -> dict[str, Any]:
    with file.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: the first line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f'{file}: a line must be an object such as {{"prompt": "…", "response": "…"}}')
    return row


def _first_row(file: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = next(pq.ParquetFile(file).iter_batches(batch_size=1), None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error
    return rows.to_pylist()[0] if rows else {}


def _no_response(path: str, row: dict[str, Any], texts: list[str]) -> str:
    chat = next((name for name in CHATS if isinstance(row.get(name), list)), None)
    if chat is not None:
        return (
            f"--rows: {chat!r} in {path} holds chats, which cannot be read yet, only columns of text: write the question "
            "and the answer of each turn to rows with the columns prompt and response"
        )
    named = ", ".join(texts) or "none"
    return f"--rows: no column of {path} is called response, answer, output or text; name one by --response (there: {named})"
