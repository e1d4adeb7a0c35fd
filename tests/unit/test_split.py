"""The split and its windows as they are foretold, held against what the data stage cuts."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.pack import _Windows
from orchestrator.data.prepare import _too_small
from orchestrator.data.split import FRACTIONS, Sized, heldout_draw, is_heldout, remedy, split
from orchestrator.data.tokenizer import TokenizerFacts
from orchestrator.errors import DataError
from orchestrator.spec.data import Data, TextSource
from orchestrator.store.records import TokenManifest
from tests.unit.test_pack import write_documents

FACTS = TokenizerFacts(sha256="", vocab_size=300, bos=None, separator=1)


@given(
    documents=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**64 - 1), st.integers(1, 60)), min_size=1, max_size=20),
    fraction=st.floats(0.01, 0.99),
    seq_len=st.integers(8, 40),
)
def test_windows_are_those_that_are_cut(documents: list[tuple[int, int, int]], fraction: float, seq_len: int) -> None:
    sides = {(held, piece): _Windows(seq_len, FACTS) for held in (True, False) for piece in range(3)}
    for piece, draw, tokens in documents:
        sides[draw < fraction * 2**64, piece].add(f"{draw:064x}:a", [2] * tokens, 0)
    found = split([Sized(*document) for document in documents], fraction, seq_len)
    cut = {held: sum(len(sides[held, piece].rows) for piece in range(3)) for held in (True, False)}
    assert (found.heldout, found.train) == (cut[True], cut[False])
    assert found.heldout_documents == sum(sides[True, piece].documents for piece in range(3))


@given(draws=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40, unique=True), tokens=st.integers(1, 400))
def test_a_remedy_works(draws: list[int], tokens: int) -> None:
    data = Data(seq_len=128)
    documents = [Sized(0, draw, tokens) for draw in draws]
    said = remedy(documents, data)
    asked = {key: float(value) for key, value in re.findall(r"data\.(heldout_fraction|seq_len) ([\d.]+)", said)}
    found = split(documents, asked.get("heldout_fraction", 0.05), int(asked.get("seq_len", 128)))
    if asked:
        assert found.heldout and found.train
    else:
        assert said == "add text"
        assert not any(s.heldout and s.train for f in FRACTIONS for s in [split(documents, f, 32)])


def test_copies_of_one_text_cannot_be_split() -> None:
    assert "several documents" in remedy([Sized(0, 5, 1000.0)] * 3, Data())


def test_the_draw_is_that_of_stored_tokens() -> None:
    """Changing it would tokenize every corpus anew."""
    digest = hashlib.sha256(b"7:abc").digest()
    assert heldout_draw("abc", 7) == int.from_bytes(digest[:8], "big")
    assert is_heldout(2**63 - 1, 0.5) and not is_heldout(2**63, 0.5)


def test_tokens_that_fill_no_window_are_answered_with_a_value(tmp_path: Path) -> None:
    """What only the tokenizer could tell is said as what was known before it."""
    write_documents(tmp_path / "text", [600] * 30)
    data = Data(source=TextSource(kind="text", paths=(f"{tmp_path}/text/*",)), heldout_fraction=0.0001, seq_len=64)
    manifest = TokenManifest.without_corpus(64, 300).model_copy(update={"documents": 30, "dropped_tokens": 9000})
    error = _too_small(data, manifest)
    assert isinstance(error, DataError)
    assert re.search(
        r"data\.heldout_fraction: 0\.0001 keeps 0 of 30 documents .*data\.heldout_fraction 0\.\d+ keeps \d+", str(error)
    )
    with pytest.raises(DataError):
        raise error
