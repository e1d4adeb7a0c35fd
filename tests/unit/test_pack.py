"""From files to token shards: no token lost or doubled, nothing held out in training, nothing unreadable passed over."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from orchestrator.data.pack import HELDOUT_WINDOWS_PER_DOCUMENT, PackedPiece, pack_piece
from orchestrator.data.sources import Piece, list_pieces
from orchestrator.data.tokenizer import TokenizerFacts
from orchestrator.errors import DataError
from orchestrator.spec.data import Data, JsonlSource, TextSource
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


@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=12),
    bos=st.booleans(),
)
def test_what_is_learnt_is_what_follows_a_prompt(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], bos: bool
) -> None:
    """Prompts are words below 300, texts the others, so every id says itself whether it is a target."""
    folder = tmp_path_factory.mktemp("prompts")
    store, word = LocalStore(folder / "store"), itertools.count()
    word_tokenizer(store)
    lines = []
    for prompt, text in lengths:
        texts = [" ".join(f"w{next(word) % 300 + first}" for _ in range(n)) for n, first in ((prompt, 0), (text, 300))]
        lines.append(json.dumps(dict(zip(("prompt", "text"), texts, strict=True))))
    (folder / "x.jsonl").write_text("\n".join(lines))
    source = JsonlSource(kind="jsonl", paths=(f"{folder}/x.jsonl",), prompt="prompt")
    data = Data(source=source, seq_len=8, rows_per_shard=5, heldout_fraction=1e-12)
    facts = replace(FACTS, bos=BOS if bos else None)
    packed = pack_piece(store, FOLDER, data, list_pieces(data)[0], facts)
    shards = [read_tokens(store, f"{FOLDER}/train", record) for record in packed.train]
    learnt = 0
    for shard in shards:
        assert shard.loss_mask is not None
        is_text = (shard.ids[:, 1:] >= 300 + FIRST_WORD) | (shard.ids[:, 1:] == SEPARATOR)
        assert (shard.loss_mask == is_text).all()
        assert shard.loss_mask.any(1).all(), "a window with nothing to learn is left out"
        learnt += int(shard.loss_mask.sum())
    assert packed.targets == learnt
    ids = sum(p + t + 1 for p, t in lengths)
    assert packed.dropped_tokens == ids - 8 * sum(len(shard.ids) for shard in shards) - (0 if bos or ids <= 8 else 1)


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


@pytest.mark.parametrize("bos", [None, BOS])
def test_held_out_windows_know_the_document_of_their_first_target(tmp_path: Path, store: LocalStore, bos: int | None) -> None:
    """Every document is one word repeated; one that stands twice, under two names, is one document."""
    word_tokenizer(store)
    (tmp_path / "text").mkdir()
    texts = [f"w{i} " * (7 + i) for i in range(30)] + ["w29 " * 36]
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    named = {i + FIRST_WORD: hashlib.sha256(text.encode()).digest()[:16] for i, text in enumerate(texts[:30])}
    data = text_data(tmp_path / "text", heldout_fraction=0.5)
    packed = pack_piece(store, FOLDER, data, list_pieces(data)[0], replace(FACTS, bos=bos))
    shards = [read_tokens(store, f"{FOLDER}/heldout", record) for record in packed.heldout]
    checked = 0
    for shard in shards:
        assert shard.documents is not None
        for ids, document in zip(shard.ids.tolist(), shard.documents, strict=True):
            # A separator belongs to the document that it ends.
            of = ids[1] if ids[1] != SEPARATOR else ids[0]
            if of != BOS:
                assert document == named[of]
                checked += 1
    assert checked > 20
    assert all(read_tokens(store, f"{FOLDER}/train", record).documents is None for record in packed.train)


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


def test_an_empty_corpus_is_an_error(tmp_path: Path, store: LocalStore) -> None:
    from orchestrator.data.prepare import Corpus, prepare_tokens

    (tmp_path / "empty.jsonl").write_text("")
    data = Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/empty.jsonl",)))
    with pytest.raises(DataError, match=r"data\.source: the corpus is empty"):
        prepare_tokens(store, Corpus("0" * 32, data, None))


def test_a_lone_surrogate_is_text_that_is_not_utf8(tmp_path: Path, store: LocalStore) -> None:
    word_tokenizer(store)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    data = Data(source=JsonlSource(kind="jsonl", paths=(f"{tmp_path}/x.jsonl",)))
    with pytest.raises(DataError, match=r"x\.jsonl at byte 14: not UTF-8 at byte 0"):
        pack_piece(store, FOLDER, data, list_pieces(data)[0], FACTS)


# The tokenizer that is trained here.


def test_the_packed_corpus_decodes_to_its_text(tokenized: Any, corpus: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenized.store.path(f"{tokenized.folder}/tokenizer/tokenizer.json")))
    manifest = tokenized.manifest
    assert tokenizer.get_vocab_size() == manifest.vocab_size == 400
    text = "".join(file.read_text() for file in sorted(corpus.iterdir()))
    assert manifest.documents + manifest.heldout_documents == 40
    for pages in (manifest.train, manifest.heldout):
        shards = [read_tokens(tokenized.store, pages.folder, record) for record in pages.records(tokenized.store)]
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
