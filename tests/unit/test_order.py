"""The training order: every row once an epoch, the same on any number of workers and with any version of numpy."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.order import TrainingOrder, shuffled

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)
seeds = st.integers(0, 2**63 - 1)

MASK = 2**64 - 1


def splitmix(words: list[int]) -> int:
    """splitmix64 in Python's own integers, absorbing one word after another."""
    state = 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def reference_permutation(n: int, *key: int) -> list[int]:
    return sorted(range(n), key=lambda i: (splitmix([*key, i]), i))


def reference_stream(shard_rows: list[int], seed: int, epochs: int) -> list[tuple[int, int]]:
    """Every (shard, row) of `epochs` epochs, one after another."""
    stream: list[tuple[int, int]] = []
    for epoch in range(epochs):
        for shard in reference_permutation(len(shard_rows), seed, epoch):
            stream += [(shard, row) for row in reference_permutation(shard_rows[shard], seed, epoch, shard)]
    return stream


def batches(order: TrainingOrder, steps: int) -> list[tuple[int, int]]:
    return [row for step in range(steps) for row in order.batch(step)]


@given(sizes, seeds, st.integers(1, 8))
def test_batches_are_the_reference_stream_cut_up(shard_rows: list[int], seed: int, global_batch: int) -> None:
    order = TrainingOrder(shard_rows, seed, global_batch)
    stream = reference_stream(shard_rows, seed, 3)
    assert batches(order, len(stream) // global_batch) == stream[: len(stream) // global_batch * global_batch]


@given(sizes, seeds, st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_shares_of_all_ranks_are_the_batch(shard_rows: list[int], seed: int, each: int, world: int, step: int) -> None:
    """Any step may be asked for first, so a resumed training sees what an unbroken one would have."""
    order = TrainingOrder(shard_rows, seed, 4 * each)
    shares = [TrainingOrder(shard_rows, seed, 4 * each).share(step, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == order.batch(step)


@given(sizes, seeds)
def test_every_row_comes_once_in_each_epoch(shard_rows: list[int], seed: int) -> None:
    order = TrainingOrder(shard_rows, seed, order_rows := sum(shard_rows))
    assert order.rows_per_epoch == order_rows
    everything = Counter((shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows))
    for epoch in range(6):  # more epochs than are remembered
        assert Counter(order.batch(epoch)) == everything
    assert Counter(order.batch(0)) == everything


def test_epochs_and_seeds_differ() -> None:
    order, other = TrainingOrder([50] * 20, 3, 1000), TrainingOrder([50] * 20, 4, 1000)
    first = order.batch(0)
    for another in (order.batch(1), order.batch(2), other.batch(0)):
        same_place = sum(a == b for a, b in zip(first, another, strict=True))
        assert same_place < 20, "two random orders of 1,000 rows agree in about one place"
    inner = [[row for shard, row in batch if shard == 7] for batch in (first, order.batch(1))]
    assert inner[0] != inner[1], "rows within a shard are shuffled anew"


def test_permutations_are_uniform(seed: int) -> None:
    """Chi-square over the 24 permutations of 4 items: 23 degrees of freedom, mean 23, deviation 6.8."""
    draws = 4800
    counts = Counter(tuple(shuffled(4, seed, i).tolist()) for i in range(draws))
    statistic = sum((counts[p] - 200) ** 2 / 200 for p in counts) + (24 - len(counts)) * 200
    assert statistic < 23 + 7 * 6.8


@given(sizes, seeds, st.integers(1, 8), st.integers(0, 40))
def test_shards_until_is_what_the_steps_touch_in_order(shard_rows: list[int], seed: int, global_batch: int, steps: int) -> None:
    order = TrainingOrder(shard_rows, seed, global_batch)
    touched = dict.fromkeys(shard for shard, _ in batches(order, steps))
    assert order.shards_until(steps) == list(touched)


GOLDEN_SHUFFLE = [1, 4, 5, 13, 11, 7, 6, 15, 9, 12, 0, 10, 3, 14, 2, 8]
GOLDEN_BATCHES = [
    [(3, 3), (3, 0), (3, 2), (3, 1)],
    [(2, 0), (2, 1), (0, 1), (0, 0)],
    [(0, 2), (1, 0), (1, 3), (1, 1)],
    [(1, 4), (1, 2), (2, 0), (2, 1)],
    [(1, 0), (1, 4), (1, 3), (1, 1)],
]


def test_golden_values() -> None:
    """Pinned: another order under the same seed would break every checkpoint and every demand on a label log."""
    assert shuffled(16, 0).tolist() == GOLDEN_SHUFFLE
    order = TrainingOrder([3, 5, 2, 4], 7, 4)
    assert [order.batch(step) for step in (0, 1, 2, 3, 1000)] == GOLDEN_BATCHES


@pytest.mark.parametrize("shard_rows", [[0], [3, 0]])
def test_an_empty_shard_is_a_bug(shard_rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        TrainingOrder(shard_rows, 0, 1)
