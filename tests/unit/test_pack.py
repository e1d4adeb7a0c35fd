"""From files to token shards: no token lost or doubled, nothing held out in training, nothing unreadable passed over."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from orchestrator.data import sources
from orchestrator.data.pack import HELDOUT_WINDOWS_PER_DOCUMENT, PackedPiece, pack_piece
from orchestrator.data.sources import Piece, corpus_listing, list_pieces, read_piece
from orchestrator.data.tokenizer import TokenizerFacts, copy_tokenizer
from orchestrator.errors import DataError
from orchestrator.spec.data import Data, JsonlSource, ParquetSource, StdlibSource, TextSource
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ShardRecord
from orchestrator.store.shards import read_tokens

SEPARATOR, BOS, UNKNOWN, PAD = 0, 1, 2, 3
FIRST_WORD = 4
FACTS = TokenizerFacts(sha256="", vocab_size=1000, bos=None, separator=SEPARATOR)
FOLDER = "data/x"


def word_tokenizer(store: LocalStore) -> Tokenizer:
    """A tokenizer under which the word w17 is id 17 + FIRST_WORD, so that ids can be written down by hand."""
    special = {"<sep>": SEPARATOR, "<bos>": BOS, "<unk>": UNKNOWN, "<pad>": PAD}
    words = {f"w{i}": i + FIRST_WORD for i in range(900)}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save(tokenizer, store)
    return tokenizer


def save(tokenizer: Tokenizer, store: LocalStore) -> None:
    folder = store.path(f"{FOLDER}/tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_documents(folder: Path, lengths: list[int]) -> list[list[int]]:
    """Text files of so many words; returns the ids of each. No two windows are alike."""
    folder.mkdir(exist_ok=True)
    documents, word = [], itertools.count()
    for index, length in enumerate(lengths):
        words = [next(word) % 900 for _ in range(length)]
        (folder / f"{index:03d}.txt").write_text(" ".join(f"w{w}" for w in words))
        documents.append([w + FIRST_WORD for w in words])
    return documents


def text_data(folder: Path, **changes: Any) -> Data:
    settings = {"seq_len": 8, "rows_per_shard": 5, "heldout_fraction": 1e-12} | changes
    return Data(source=TextSource(kind="text", paths=(f"{folder}/*",)), **settings)


def read_rows(store: LocalStore, part: str, records: tuple[ShardRecord, ...]) -> list[tuple[bytes, list[int]]]:
    shards = [read_tokens(store, f"{FOLDER}/{part}", record) for record in records]
    return [(row_id, ids.tolist()) for shard in shards for row_id, ids in zip(shard.row_ids, shard.ids, strict=True)]


def reference_windows(documents: list[list[int]], seq_len: int, bos: int | None, separator: int | None) -> list[list[int]]:
    end = [] if separator is None else [separator]
    stream = [i for document in documents for i in document + end]
    if bos is None:
        starts = range(0, len(stream) - seq_len, seq_len)
        return [stream[s : s + seq_len + 1] for s in starts]
    return [[bos, *stream[s : s + seq_len]] for s in range(0, len(stream) - seq_len + 1, seq_len)]


def in_piece_order(documents: list[list[int]], piece: Piece) -> list[list[int]]:
    return [documents[int(Path(path).stem)] for path, _ in piece.files]


# Packing.


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    seq_len=st.integers(8, 12),
    bos=st.sampled_from([None, BOS]),
    separator=st.sampled_from([None, SEPARATOR]),
)
def test_windows_are_the_stream_cut_up(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, bos: int | None, separator: int | None
) -> None:
    root = tmp_path_factory.mktemp("pack")
    store, data = LocalStore(root / "store"), text_data(root / "text", seq_len=seq_len)
    word_tokenizer(store)
    documents = write_documents(root / "text", lengths)
    (piece,) = list_pieces(data)
    packed = pack_piece(store, FOLDER, data, piece, replace(FACTS, bos=bos, separator=separator))
    rows = read_rows(store, "train", packed.train)
    windows = [ids for _, ids in rows]
    expected = reference_windows(in_piece_order(documents, piece), seq_len, bos, separator)
    assert sorted(windows) == sorted(expected)
    assert len({row_id for row_id, _ in rows}) == len(rows)
    assert all(record.rows == 5 for record in packed.train[:-1])

    targets = Counter(i for window in windows for i in window[1:])
    stream = [i for document in in_piece_order(documents, piece) for i in document + ([] if separator is None else [separator])]
    first = 0 if bos is not None else 1
    used = stream[first : first + len(windows) * seq_len]
    assert targets == Counter(used), "every id of the stream is a target once; without BOS, the very first has no context"
    assert packed.documents == len(lengths)
    assert packed.dropped_tokens == len(stream) - len(used) - (first if windows else 0)


def test_one_long_document_is_not_the_whole_measure(tmp_path: Path, store: LocalStore) -> None:
    word_tokenizer(store)
    (document,) = write_documents(tmp_path / "text", [400])
    data = text_data(tmp_path / "text", heldout_fraction=1 - 1e-12)
    packed = pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)
    windows = [ids for _, ids in read_rows(store, "heldout", packed.heldout)]
    assert sorted(windows) == sorted(
        reference_windows([document[: 8 * HELDOUT_WINDOWS_PER_DOCUMENT]], 8, FACTS.bos, FACTS.separator)
    )
    assert packed.dropped_tokens >= 400 - 8 * HELDOUT_WINDOWS_PER_DOCUMENT


def test_rows_are_spread_over_the_shards(tmp_path: Path, store: LocalStore) -> None:
    word_tokenizer(store)
    write_documents(tmp_path / "text", [400])
    data = text_data(tmp_path / "text")
    packed = pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)
    firsts = [ids[0] for _, ids in read_rows(store, "train", packed.train)]
    assert len(firsts) == 50
    assert firsts != sorted(firsts)


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [30, 50, 7, 80])
    data = text_data(tmp_path / "text", heldout_fraction=0.3)
    (piece,) = list_pieces(data)
    results = []
    for name, settings in (("a", data), ("b", data), ("c", data.model_copy(update={"seed": 1}))):
        store = LocalStore(tmp_path / name)
        word_tokenizer(store)
        results.append(pack_piece(store, FOLDER, settings, piece, FACTS))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_a_packed_piece_is_not_read_again(tmp_path: Path, store: LocalStore) -> None:
    word_tokenizer(store)
    write_documents(tmp_path / "text", [30, 50])
    data = text_data(tmp_path / "text")
    (piece,) = list_pieces(data)
    first = pack_piece(store, FOLDER, data, piece, FACTS)
    for path, _ in piece.files:
        Path(path).unlink()
    assert pack_piece(store, FOLDER, data, piece, FACTS) == first
    shutil.copytree(store.path(f"{FOLDER}/tokenizer"), store.path("data/other/tokenizer"))
    with pytest.raises(DataError, match="cannot be read"):
        pack_piece(store, "data/other", data, piece, FACTS)


def test_a_tokenizer_is_copied_without_the_weights_beside_it(tmp_path: Path) -> None:
    kept = {"tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"}
    weights = {"model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"}
    (tmp_path / "model").mkdir()
    for name in kept | weights:
        (tmp_path / "model" / name).write_text("")
    copy_tokenizer(tmp_path / "model", tmp_path / "tokenizer")
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == kept


def test_row_ids_depend_on_the_documents_alone(tmp_path: Path) -> None:
    """Shards of another size hold the same rows under the same names."""
    write_documents(tmp_path / "text", [100])
    ids = []
    for rows_per_shard in (3, 7):
        store = LocalStore(tmp_path / str(rows_per_shard))
        word_tokenizer(store)
        data = text_data(tmp_path / "text", rows_per_shard=rows_per_shard)
        packed = pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)
        ids.append({row_id for row_id, _ in read_rows(store, "train", packed.train)})
    assert ids[0] == ids[1]


def test_a_tokenizer_that_pads_and_truncates_does_neither_here(tmp_path: Path, store: LocalStore) -> None:
    documents = write_documents(tmp_path / "text", [3, 40, 11])
    tokenizer = word_tokenizer(store)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    save(tokenizer, store)
    data = text_data(tmp_path / "text")
    (piece,) = list_pieces(data)
    packed = pack_piece(store, FOLDER, data, piece, FACTS)
    windows = [ids for _, ids in read_rows(store, "train", packed.train)]
    assert sorted(windows) == sorted(reference_windows(in_piece_order(documents, piece), 8, None, SEPARATOR))


def test_held_out_documents_are_in_no_training_window(tmp_path: Path, store: LocalStore) -> None:
    """Every document is one word repeated, so that each window says whose it is."""
    word_tokenizer(store)
    (tmp_path / "text").mkdir()
    for i in range(200):
        (tmp_path / "text" / f"{i}.txt").write_text(f"w{i} " * 40)
    data = text_data(tmp_path / "text", heldout_fraction=0.25)
    packed = pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)
    found = {
        part: {i for _, ids in read_rows(store, part, records) for i in ids} - {SEPARATOR}
        for part, records in (("train", packed.train), ("heldout", packed.heldout))
    }
    assert not found["train"] & found["heldout"]
    assert found["train"] | found["heldout"] == {i + FIRST_WORD for i in range(200)}
    assert len(found["heldout"]) == packed.heldout_documents
    assert len(found["train"]) == packed.documents == 200 - packed.heldout_documents
    assert 25 < packed.heldout_documents < 80, "a quarter of 200, six standard deviations either way"


# What cannot be used.


def pack_with_bad_bytes(tmp_path: Path, store: LocalStore, policy: str) -> PackedPiece:
    tokenizer = word_tokenizer(store)
    assert tokenizer.token_to_id("<unk>") == UNKNOWN
    write_documents(tmp_path / "text", [20, 20])
    (tmp_path / "text" / "bad.txt").write_bytes(b"w1 w2 \xff\xfe w3 " * 10)
    (tmp_path / "text" / "empty.txt").write_bytes(b"")
    data = text_data(tmp_path / "text", undecodable=policy)
    return pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)


def test_undecodable_text_is_an_error(tmp_path: Path, store: LocalStore) -> None:
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 6 \(data\.undecodable: replace \| skip\)") as caught:
        pack_with_bad_bytes(tmp_path, store, "error")
    assert caught.value.exit_code == 3
    assert not list(store.root.rglob("*.parquet"))


def test_undecodable_text_is_replaced(tmp_path: Path, store: LocalStore) -> None:
    packed = pack_with_bad_bytes(tmp_path, store, "replace")
    assert (packed.documents, packed.skipped_documents) == (3, 1), "the empty one is skipped under any policy"
    ids = {i for _, ids in read_rows(store, "train", packed.train) for i in ids}
    assert UNKNOWN in ids


def test_undecodable_text_is_skipped(tmp_path: Path, store: LocalStore) -> None:
    packed = pack_with_bad_bytes(tmp_path, store, "skip")
    assert (packed.documents, packed.skipped_documents) == (2, 2)
    assert UNKNOWN not in {i for _, ids in read_rows(store, "train", packed.train) for i in ids}


@pytest.mark.parametrize("pattern", ["nothing/*.txt", "gone.txt", "text"])
def test_a_pattern_without_a_file_is_named(tmp_path: Path, pattern: str) -> None:
    write_documents(tmp_path / "text", [20])
    source = TextSource(kind="text", paths=(f"{tmp_path}/text/*", f"{tmp_path}/{pattern}"))
    for look in (lambda: list_pieces(Data(source=source)), lambda: corpus_listing(source)):
        with pytest.raises(DataError, match=re.escape(f"data.source.paths: no file matches {tmp_path}/{pattern}")) as caught:
            look()
        assert caught.value.exit_code == 3


def test_an_empty_corpus_is_an_error(tmp_path: Path, store: LocalStore) -> None:
    from orchestrator.data.prepare import Corpus, prepare_tokens

    (tmp_path / "empty.jsonl").write_text("")
    data = Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/empty.jsonl",)))
    with pytest.raises(DataError, match=r"data\.source: the corpus is empty"):
        prepare_tokens(store, Corpus("0" * 32, data, None))


# Pieces.

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)


def read_all(data: Data) -> list[tuple[str, bytes]]:
    pieces = list_pieces(data)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    return [document for piece in pieces for document in read_piece(data.source, piece)]


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
        patch.setattr(sources, "PIECE_BYTES", step)
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
        (b"[1]", "'text' is NoneType, not text"),
        (b'{"other": "x"}', "'text' is NoneType, not text"),
        (b'{"text": 5}', "'text' is int, not text"),
        (b'{"text": null}', "'text' is NoneType, not text"),
    ],
    ids=range(7),
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=rf"x\.jsonl at byte 14: {re.escape(message)}") as caught:
        read_all(Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/x.jsonl",))))
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()


def test_a_lone_surrogate_is_text_that_is_not_utf8(tmp_path: Path, store: LocalStore) -> None:
    word_tokenizer(store)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    data = Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/x.jsonl",)))
    with pytest.raises(DataError, match=r"x\.jsonl at byte 14: not UTF-8 at byte 0"):
        pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)


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
        patch.setattr(sources, "PIECE_ROWS", step)
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
    with pytest.raises(DataError, match=r"t\.parquet: no column 'body', there are text, other"):
        read_all(Data(source=ParquetSource(kind="parquet", paths=paths, column="body")))
    with pytest.raises(DataError, match=r"t\.parquet row 1: 'text' is NoneType, not text"):
        read_all(Data(source=ParquetSource(kind="parquet", paths=paths)))


def test_text_files_are_spread_over_pieces_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "text", list(range(1, 60)))
    data = text_data(tmp_path / "text")
    (whole,) = list_pieces(data)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
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


# The tokenizer that is trained here.


def test_the_packed_corpus_decodes_to_its_text(tokenized: Any, corpus: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenized.store.path(f"{tokenized.folder}/tokenizer/tokenizer.json")))
    manifest = tokenized.manifest
    assert tokenizer.get_vocab_size() == manifest.vocab_size == 400
    text = "".join(file.read_text() for file in sorted(corpus.iterdir()))
    assert manifest.documents + manifest.heldout_documents == 40
    for part, records in (("train", manifest.train), ("heldout", manifest.heldout)):
        shards = [read_tokens(tokenized.store, f"{tokenized.folder}/{part}", record) for record in records]
        for ids in np.concatenate([shard.ids for shard in shards]):
            piece = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            assert all(part.strip("\ufffd") in text for part in piece.split("<|endoftext|>"))


def test_a_vocabulary_the_corpus_cannot_fill_is_an_error(tmp_path: Path) -> None:
    from orchestrator.data.tokenizer import train_tokenizer
    from orchestrator.spec.data import TrainTokenizer

    (tmp_path / "x.txt").write_text("a b a b")
    data = text_data(tmp_path)
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size: the corpus yields only \d+ entries, not 4096"):
        train_tokenizer(data, TrainTokenizer(vocab_size=4096), list_pieces(data), tmp_path / "out")


def test_a_file_that_is_gone_is_named(tmp_path: Path, store: LocalStore) -> None:
    word_tokenizer(store)
    write_documents(tmp_path / "text", [40, 40])
    data = text_data(tmp_path / "text")
    (piece,) = list_pieces(data)
    (tmp_path / "text" / "001.txt").unlink()
    with pytest.raises(DataError, match=r"001\.txt: cannot be read: No such file"):
        pack_piece(store, FOLDER, data, piece, FACTS)
