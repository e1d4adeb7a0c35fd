"""Corpora as pieces: a piece is what one task reads, and the list of pieces depends on the corpus alone.

How many workers there are never changes a piece, so the token shards are the same on a laptop and on a cluster.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.data.sizing import piece_size
from orchestrator.errors import DataError
from orchestrator.plan.order import shuffled
from orchestrator.spec.data import Data, DatasetSource, JsonlSource, ParquetSource, Source, StdlibSource, TextSource

COMPRESSED = 3
"""Bytes of text in a byte of a Parquet file, about."""
MOST_NAMED = 8
"""Columns that a message lists."""


class Document(NamedTuple):
    name: str
    """File, or file and row."""
    text: bytes
    """UTF-8"""
    prompt: bytes = b""
    """Prompt that precedes the text and is not learnt."""


@dataclass(frozen=True)
class Piece:
    """A part of a corpus that one task turns into token shards."""

    index: int
    files: tuple[tuple[str, str], ...]
    """(path, name) of each file."""
    first: int = 0
    """First byte (jsonl) or row (parquet, dataset) of the part, where a file is split."""
    last: int = 0
    """End of the part, exclusive."""


def corpus_listing(source: Source) -> list[list[Any]]:
    """Return what identifies the corpus before it is read: [name, bytes, mtime in ns] per file, or the data set's fingerprint.

    A touched file is read and tokenized again; identical tokens still meet the labels made for them.
    """
    if isinstance(source, DatasetSource):
        return [[source.name, _dataset(source)._fingerprint]]
    stats = [(name, Path(path).stat()) for path, name in _files(source)]
    return [[name, s.st_size, s.st_mtime_ns] for name, s in stats]


def corpus_bytes(source: Source) -> int:
    """About how much text there is, from sizes alone; raises `DataError` if there is nothing to read."""
    if isinstance(source, DatasetSource):
        return int(_dataset(source).data.nbytes)
    return _text_bytes(source, _files(source))


def _text_bytes(source: Source, files: Sequence[tuple[str, str]]) -> int:
    size = sum(Path(path).stat().st_size for path, _ in files)
    return size * COMPRESSED if isinstance(source, ParquetSource) else size


def list_pieces(data: Data) -> list[Piece]:
    """Cut the corpus of `data` into pieces; raises `DataError` if there is nothing to read."""
    source = data.source
    if isinstance(source, DatasetSource):
        rows, most = len(_dataset(source)), piece_size(data, corpus_bytes(source))
        return [Piece(i, ((source.name, source.name),), a, b) for i, (a, b) in enumerate(_ranges(rows, most.rows))]
    files = _files(source)
    most = piece_size(data, _text_bytes(source, files))
    if isinstance(source, StdlibSource | TextSource):
        return _grouped(files, data.seed, most.bytes)
    parts: list[tuple[tuple[str, str], int, int]] = []
    for path, name in files:
        size, step = (
            (_parquet_rows(path), most.rows) if isinstance(source, ParquetSource) else (Path(path).stat().st_size, most.bytes)
        )
        parts += [((path, name), a, b) for a, b in _ranges(size, step)]
    return [Piece(i, (file,), a, b) for i, (file, a, b) in enumerate(parts)]


def read_piece(source: Source, piece: Piece) -> Iterator[Document]:
    """The documents of `piece`; raises `DataError` naming the file and row that cannot be used."""
    return READERS[source.kind](source, piece)


def _read_files(source: StdlibSource | TextSource, piece: Piece) -> Iterator[Document]:
    for path, name in piece.files:
        with _readable(name):
            content = Path(path).read_bytes()
        yield Document(name, content)


def _read_jsonl(source: JsonlSource, piece: Piece) -> Iterator[Document]:
    ((path, name),) = piece.files
    with _readable(name), Path(path).open("rb") as file:
        if piece.first:
            file.seek(piece.first - 1)
            file.readline()
        while (start := file.tell()) < piece.last:
            line = file.readline()
            if not line.strip():
                continue
            where = f"{name} at byte {start}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not a JSON line: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"{where}: not a JSON object with fields, but {_kind(value)}")
            yield _document(where, value, ("field", source.field), source.prompt)


def _read_parquet(source: ParquetSource, piece: Piece) -> Iterator[Document]:
    import pyarrow.parquet as pq

    ((path, name),) = piece.files
    with _readable_parquet(path):
        file = pq.ParquetFile(path)
        columns = _columns(name, source, file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(batch_size=1024, columns=columns) for row in batch.to_pylist())
        for index, row in enumerate(itertools.islice(rows, piece.first, piece.last), piece.first):
            yield _document(f"{name} row {index}", row, ("column", source.column), source.prompt)


def _read_dataset(source: DatasetSource, piece: Piece) -> Iterator[Document]:
    data = _dataset(source)
    _columns(source.name, source, data.column_names)
    for row in range(piece.first, piece.last):
        yield _document(f"{source.name} row {row}", data[row], ("column", source.column), source.prompt)


READERS: dict[str, Callable[[Any, Piece], Iterator[Document]]] = {
    "stdlib": _read_files,
    "text": _read_files,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
}


def _files(source: Source) -> list[tuple[str, str]]:
    """(path, name) of every file of a file-based source, sorted by name."""
    if isinstance(source, StdlibSource):
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted((str(p), str(p.relative_to(root))) for p in _python_files(root))
    assert not isinstance(source, DatasetSource)
    paths: set[str] = set()
    for pattern in source.paths:
        found = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207 — takes absolute patterns
        matches = [p for p in found if Path(p).is_file()]
        if not matches:
            raise DataError(f"data.source.paths: no file matches {pattern}")
        paths.update(matches)
    return sorted((str(Path(p).absolute()), p) for p in paths)


def _python_files(root: Path) -> Iterator[Path]:
    """The library's own sources; what others installed there is not even looked at."""
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - {"site-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib"}
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _grouped(files: Sequence[tuple[str, str]], seed: int, piece_bytes: int) -> list[Piece]:
    """Whole files, spread at random over pieces of about `piece_bytes`."""
    groups: list[list[tuple[str, str]]] = [[]]
    size = 0
    for i in shuffled(len(files), seed):
        if size >= piece_bytes:
            groups.append([])
            size = 0
        groups[-1].append(files[int(i)])
        size += Path(files[int(i)][0]).stat().st_size
    return [Piece(i, tuple(group)) for i, group in enumerate(groups)]


def _ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(a, min(a + step, size)) for a in range(0, size, step)]


def _columns(name: str, source: ParquetSource | DatasetSource, present: Sequence[str]) -> list[str]:
    """The columns to read; raises `DataError` for one that is not there."""
    wanted = {"column": source.column} | ({"prompt": source.prompt} if source.prompt else {})
    for key, column in wanted.items():
        if column not in present:
            raise DataError(f"{name}: no column {column!r}; set data.source.{key} to one of {', '.join(present[:MOST_NAMED])}")
    return list(wanted.values())


def _document(where: str, row: Mapping[str, Any], text: tuple[str, str], prompt: str | None) -> Document:
    """The document of `row`; `text` is the key of the job file that names its field, and that field."""
    before = _text(where, row, "prompt", prompt) if prompt else b""
    return Document(where, _text(where, row, *text), before)


def _text(where: str, row: Mapping[str, Any], key: str, field: str) -> bytes:
    value = row.get(field)
    if isinstance(value, str):
        return value.encode("utf-8", errors="surrogatepass")
    if field in row and value is None:
        raise DataError(f"{where}: {field!r} is null; take such rows out, or give them a text")
    found = f"{field!r} is {_kind(value)}, not text" if field in row else f"no {field!r}"
    texts = [name for name, other in row.items() if isinstance(other, str)][:MOST_NAMED]
    hint = f"set data.source.{key} to one of {', '.join(texts)}" if texts else "write what is to be learnt as one text"
    chat = (
        " (the tokenizer's apply_chat_template makes one of messages, for data.special_tokens_in_text: allow)"
        if _is_chat(value)
        else ""
    )
    raise DataError(f"{where}: {found}; {hint}{chat}")


def _kind(value: Any) -> str:
    """The type of a JSON value in words."""
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "content" in value[0]


def _parquet_rows(path: str) -> int:
    import pyarrow.parquet as pq

    with _readable_parquet(path):
        return pq.ParquetFile(path).metadata.num_rows


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn a file that may not be read, or is gone, into a `DataError` that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


@contextmanager
def _readable_parquet(path: str) -> Iterator[None]:
    """Turn a truncated or foreign file into a `DataError` that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _dataset(source: DatasetSource) -> Any:
    import datasets

    try:
        if Path(source.name).is_dir() and (Path(source.name) / "state.json").exists():
            return datasets.load_from_disk(source.name)
        return datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:
        raise DataError(f"data.source.name: cannot load {source.name}: {error}") from error
