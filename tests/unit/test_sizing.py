"""Sizes of shards and pieces: small for a small corpus, and few enough for the largest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.sizing import BYTES_PER_TOKEN, cut_evenly, group_rows, piece_size, shard_rows
from orchestrator.spec.data import Data

LARGE = 10**13
"""Tokens of a large corpus."""


@pytest.mark.parametrize("seq_len", [256, 4096, 32_768])
def test_small_corpora_have_small_shards_and_large_ones_few(seq_len: int) -> None:
    data = Data(seq_len=seq_len)
    sizes = [shard_rows(data, tokens * BYTES_PER_TOKEN) for tokens in (10**5, 10**7, 10**9, 10**11, LARGE)]
    assert sizes == sorted(sizes) and all(size % data.rows_per_group == 0 for size in sizes)
    assert sizes[1] <= 64
    assert sizes[-1] * seq_len <= 24 << 20
    rows, shards = LARGE // seq_len, 0
    piece_rows = piece_size(data, LARGE * BYTES_PER_TOKEN).bytes // BYTES_PER_TOKEN // seq_len
    for tokens_to_a_byte in (0.8, 1.0, 1.25):  # text is never as estimated
        rows_here = int(piece_rows * tokens_to_a_byte)
        shards = len(cut_evenly(rows_here, sizes[-1], 16)) * (rows / rows_here)
        assert shards <= 510_000


def test_what_the_job_says_is_taken() -> None:
    assert shard_rows(Data(rows_per_shard=64), LARGE) == 64
    assert shard_rows(Data(rows_per_shard=40), LARGE) == 32, "whole row groups"
    assert (shard_rows(Data(rows_per_shard=5), 1), group_rows(Data(rows_per_shard=5))) == (5, 5)
    assert group_rows(Data(rows_per_group=4)) == 4


def test_a_tiny_corpus_has_some_shards_to_follow() -> None:
    assert len(cut_evenly(100, shard_rows(Data(seq_len=64), 100 * 64 * BYTES_PER_TOKEN), 16)) >= 4


@given(rows=st.integers(0, 3000), groups=st.integers(1, 9), group=st.integers(1, 32))
def test_a_piece_is_cut_evenly(rows: int, groups: int, group: int) -> None:
    most = groups * group
    parts = cut_evenly(rows, most, group)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= most for size in sizes) and all(size % group == 0 for size in sizes[:-1])
    assert len(parts) == math.ceil(math.ceil(rows / group) / groups)
    assert not sizes or max(sizes) - min(sizes) < 2 * group
