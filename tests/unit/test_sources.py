"""Corpora as pieces: every document once, and what cannot be read is named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import sizing
from orchestrator.data.sources import corpus_listing, list_pieces, read_piece
from orchestrator.errors import DataError
from orchestrator.spec.data import Data, JsonlSource, ParquetSource, StdlibSource, TextSource
from tests.unit.test_pack import text_data, write_documents


@pytest.mark.parametrize("pattern", ["nothing/*.txt", "gone.txt", "text"])
def test_a_pattern_without_a_file_is_named(tmp_path: Path, pattern: str) -> None:
    write_documents(tmp_path / "text", [20])
    source = TextSource(kind="text", paths=(f"{tmp_path}/text/*", f"{tmp_path}/{pattern}"))
    for look in (lambda: list_pieces(Data(source=source)), lambda: corpus_listing(source)):
        with pytest.raises(DataError, match=re.escape(f"data.source.paths: no file matches {tmp_path}/{pattern}")) as caught:
            look()
        assert caught.value.exit_code == 3


TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)


def read_all(data: Data) -> list[tuple[str, bytes]]:
    pieces = list_pieces(data)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    return [(name, text) for piece in pieces for name, text, _ in read_piece(data.source, piece)]


@given(
    files=st.lists(st.lists(TEXTS, max_size=12), min_size=1, max_size=3),
    step=st.integers(1, 200),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    last=st.booleans(),
    ascii_only=st.booleans(),
)
def test_jsonl_pieces_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], step: int, end: str, last: bool, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("jsonl")
    for index, texts in enumerate(files):
        lines = end.join(json.dumps({"n": i, "body": text}, ensure_ascii=ascii_only) for i, text in enumerate(texts))
        (folder / f"{index}.jsonl").write_bytes((lines + end * last).encode())
    data = Data(source=JsonlSource(kind="jsonl", paths=(f"{folder}/*",), field="body"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "PIECE_BYTES", step)
        patch.setattr(sizing, "PIECE_SHARDS", 0)
        documents = read_all(data)
        size = sum((folder / f"{index}.jsonl").stat().st_size for index in range(len(files)))
        assert len(list_pieces(data)) >= size / step
    assert [raw.decode() for _, raw in documents] == [text for texts in files for text in texts]
    assert documents == read_all(data), "names and order do not depend on where the file is cut"
    assert len({name for name, _ in documents}) == len(documents)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a JSON line"),
        (b"[" * 100_000, "not a JSON line"),
        (b'"\xff"', "not a JSON line"),
        (b"[1]", "not a JSON object with fields, but a list"),
        (b'{"other": "x"}', "no 'text'; set data.source.field to one of other"),
        (b'{"text": 5}', "'text' is a number, not text; write what is to be learnt as one text"),
        (b'{"text": null}', "'text' is null; take such rows out, or give them a text"),
    ],
    ids=range(7),
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=rf"x\.jsonl at byte 14: {re.escape(message)}") as caught:
        read_all(Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/x.jsonl",))))
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()


def write_parquet(path: Path, values: list[Any], rows_per_group: int) -> None:
    pq.write_table(pa.table({"text": values, "other": list(range(len(values)))}), path, row_group_size=rows_per_group)


@given(rows=st.integers(0, 60), step=st.integers(1, 25), rows_per_group=st.integers(1, 30))
def test_parquet_pieces_hold_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, rows: int, step: int, rows_per_group: int
) -> None:
    folder = tmp_path_factory.mktemp("parquet")
    texts = [f"row {i} é" for i in range(rows)]
    write_parquet(folder / "a.parquet", texts[: rows // 3], rows_per_group)
    write_parquet(folder / "b.parquet", texts[rows // 3 :], rows_per_group)
    data = Data(source=ParquetSource(kind="parquet", paths=(f"{folder}/*.parquet",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "PIECE_ROWS", step)
        documents = read_all(data)
        assert all(piece.last - piece.first <= step for piece in list_pieces(data))
    assert [raw.decode() for _, raw in documents] == texts
    assert documents == read_all(data)
    assert len({name for name, _ in documents}) == rows


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "t.parquet"
    write_parquet(path, [f"row {i}" for i in range(5000)], 500)
    data = Data(source=ParquetSource(kind="parquet", paths=(str(path),)))
    whole = list_pieces(data)
    os.truncate(path, int(path.stat().st_size * keep))
    for look in (lambda: list_pieces(data), lambda: list(read_piece(data.source, whole[0]))):
        with pytest.raises(DataError, match=re.escape(f"{path}: not a readable Parquet file")) as caught:
            look()
        assert caught.value.exit_code == 3


def test_parquet_damage_behind_an_intact_footer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_parquet(path, [f"row {i}" for i in range(5000)], 500)
    data = Data(source=ParquetSource(kind="parquet", paths=(str(path),)))
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(2000) + content[2004:])
    assert list_pieces(data)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_all(data)


def test_a_missing_column_and_a_missing_value_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", ["a", None], 10)
    paths = (f"{tmp_path}/t.parquet",)
    with pytest.raises(DataError, match=r"t\.parquet: no column 'body'; set data\.source\.column to one of text, other"):
        read_all(Data(source=ParquetSource(kind="parquet", paths=paths, column="body")))
    with pytest.raises(DataError, match=r"t\.parquet row 1: 'text' is null"):
        read_all(Data(source=ParquetSource(kind="parquet", paths=paths)))


def test_text_files_are_spread_over_pieces_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "text", list(range(1, 60)))
    data = text_data(tmp_path / "text")
    (whole,) = list_pieces(data)
    monkeypatch.setattr(sizing, "PIECE_BYTES", 1000)
    monkeypatch.setattr(sizing, "PIECE_SHARDS", 0)
    pieces = list_pieces(data)
    assert len(pieces) > 4
    assert [file for piece in pieces for file in piece.files] == list(whole.files), "the split is a cut through one order"
    assert len(set(whole.files)) == 59
    assert list(whole.files) != sorted(whole.files)
    for piece in pieces:
        assert sum(Path(path).stat().st_size for path, _ in piece.files[:-1]) < 1000


def test_a_file_matched_twice_is_read_once(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [5, 6])
    source = TextSource(kind="text", paths=(f"{tmp_path}/text/*", f"{tmp_path}/**/*.txt"))
    assert [Path(path).name for path, _ in sorted(list_pieces(Data(source=source))[0].files)] == ["000.txt", "001.txt"]


def test_a_touched_file_is_another_corpus(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [5, 6])
    source = TextSource(kind="text", paths=(f"{tmp_path}/text/*",))
    before = corpus_listing(source)
    assert corpus_listing(source) == before
    os.utime(tmp_path / "text" / "000.txt", ns=(1, 1))
    assert corpus_listing(source) != before


def test_the_standard_library_is_a_corpus() -> None:
    pieces = list_pieces(Data(source=StdlibSource()))
    names = [name for piece in pieces for _, name in piece.files]
    assert "json/decoder.py" in names
    assert len(set(names)) == len(names) > 300
    assert not [name for name in names if "site-packages" in name or name.startswith("test/")]


def test_prompts_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "prompt": "b"}\n{"text": "a"}\n')
    data = Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/x.jsonl",), prompt="prompt"))
    with pytest.raises(DataError, match=r"x\.jsonl at byte 29: no 'prompt'; set data\.source\.prompt to one of text"):
        read_all(data)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    data = Data(source=ParquetSource(kind="parquet", paths=(f"{tmp_path}/x.parquet",), prompt="prompt"))
    with pytest.raises(DataError, match=r"x\.parquet: no column 'prompt'; set data\.source\.prompt to one of text"):
        read_all(data)
