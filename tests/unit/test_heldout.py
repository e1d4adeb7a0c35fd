"""Which held-out windows a model is measured on."""

from __future__ import annotations

import pytest

from orchestrator.store.heldout import choose_measured, choose_watched, disjoint, measured_rows, watched_rows
from orchestrator.store.shards import read_tokens
from tests.conftest import TokenizedCorpus


@pytest.mark.parametrize("rows", [1, 3, 20, 10_000])
def test_windows_come_evenly_from_all_shards(tokenized: TokenizedCorpus, rows: int) -> None:
    store, folder, manifest = tokenized.store, tokenized.folder, tokenized.manifest
    shards = [read_tokens(store, f"{folder}/heldout", record).ids.tolist() for record in manifest.heldout.records(store)]
    assert len(shards) > 2
    windows = measured_rows(store, folder, manifest, rows, watched=0).ids
    found = [sum(window in shard for window in windows.tolist()) for shard in shards]
    assert sum(found) == len(windows) <= rows
    share = -(-rows // len(shards))
    assert all(share - 1 <= n <= share or n == len(shard) for n, shard in zip(found, shards, strict=True))


CASES = [
    ([1] * 200, 64, 36),  # as many shards as rows: the other end of a shard is the same row
    ([100], 64, 36),  # just enough
    ([50, 50], 64, 36),
    ([90, 10], 64, 36),  # a short last shard, all of which is watched
    ([5, 5, 5], 128, 3),  # fewer than asked for, but enough beside those that are watched
    ([40] * 3, 1, 16),
]


@pytest.mark.parametrize(("shards", "rows", "watched"), CASES)
def test_rows_that_are_watched_are_not_measured(shards: list[int], rows: int, watched: int) -> None:
    """Fault of kind: of shards with few rows, both ends are the same rows, and a model was measured on what chose it."""
    taken, measured = choose_watched(shards, watched), choose_measured(shards, rows, watched)
    assert disjoint(shards, rows, watched)
    assert not {(s, r) for s, rs in taken.items() for r in rs} & {(s, r) for s, rs in measured.items() for r in rs}
    assert sum(map(len, measured.values())) == min(rows, sum(shards) - watched)
    for choice in (taken, measured):
        assert all(len(rs) and rs.start >= 0 and rs.stop <= shards[s] for s, rs in choice.items())


@pytest.mark.parametrize(("shards", "rows", "watched"), [([1] * 20, 128, 16), ([20], 128, 16), ([3], 64, 3)])
def test_too_few_rows_for_both_are_shared_and_said_to_be(shards: list[int], rows: int, watched: int) -> None:
    assert not disjoint(shards, rows, watched)
    assert choose_measured(shards, rows, watched) == choose_measured(shards, rows, 0), "all there are"


@pytest.mark.parametrize(("shards", "rows"), [(shards, rows) for shards, rows, _ in CASES])
def test_without_evaluations_the_first_rows_of_evenly_many_shards_are_measured(shards: list[int], rows: int) -> None:
    count = min(rows, len(shards))
    expected = {}
    for i in range(count):
        shard = i * len(shards) // count
        expected[shard] = range(min(rows // count + (i < rows % count), shards[shard]))
    assert choose_measured(shards, rows, 0) == expected and disjoint(shards, rows, 0)


def test_rows_that_are_read_are_those_that_were_chosen(tokenized: TokenizedCorpus) -> None:
    store, folder, manifest = tokenized.store, tokenized.folder, tokenized.manifest
    rows = watched = sum(manifest.heldout_rows) // 3
    sets = [set(measured_rows(store, folder, manifest, rows, n).row_ids) for n in (0, watched)]
    watch = set(watched_rows(store, folder, manifest, watched).row_ids)
    assert len(watch) <= watched and not watch & sets[1]
    for found, n in zip(sets, (0, watched), strict=True):
        assert len(found) == sum(map(len, choose_measured(manifest.heldout_rows, rows, n).values()))
