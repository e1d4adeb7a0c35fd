"""The training order: every row once an epoch, the same on any number of workers and with any version of numpy."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.order import TrainingOrder, shuffled

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)
groups = st.sampled_from([1, 2, 4, 5, 16])
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


def reference_stream(shard_rows: list[int], group: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Every (shard, row) of an epoch: whole groups first, the short ends of shards after them."""
    whole, ends = list[tuple[int, int]](), list[tuple[int, int]]()
    for shard in reference_permutation(len(shard_rows), seed, epoch):
        full, short = divmod(shard_rows[shard], group)
        for number in reference_permutation(full, seed, epoch, shard):
            whole += [(shard, number * group + row) for row in reference_permutation(group, seed, epoch, shard, number)]
        if short:
            ends += [(shard, full * group + row) for row in reference_permutation(short, seed, epoch, shard, full)]
    return whole + ends


def reference_windows(group: int, steps: int) -> list[int]:
    """Steps of one window after another, until there are `steps` or more."""
    windows = [1]
    while sum(windows) < steps:
        windows.append(min(sum(windows), group - sum(windows)) if sum(windows) < group else group)
    return windows


def reference_epoch(shard_rows: list[int], group: int, seed: int, batch: int, epoch: int, end: int) -> list[tuple[int, int]]:
    """The rows of an epoch in the order in which they are trained on; training ends after `end` of them."""
    stream, trained = reference_stream(shard_rows, group, seed, epoch)[:end], list[tuple[int, int]]()
    before = epoch * sum(shard_rows)
    for steps in reference_windows(group, -(-len(stream) // batch)):
        piece = stream[len(trained) : len(trained) + steps * batch]
        positions = [before + len(trained) + i for i in range(len(piece))]
        laid = dict(zip(sorted(positions, key=lambda p: (p % batch, p)), piece, strict=True))
        trained += [laid[position] for position in positions]
    return trained


def batches(order: TrainingOrder, steps: int) -> list[tuple[int, int]]:
    return [row for step in range(steps) for row in order.batch(step)]


@given(sizes, groups, seeds, st.integers(1, 8), st.integers(1, 30))
def test_batches_are_the_reference_stream_in_windows(
    shard_rows: list[int], group: int, seed: int, batch: int, steps: int
) -> None:
    order, rows = TrainingOrder(shard_rows, group, seed, batch, steps), sum(shard_rows)
    expected = list[tuple[int, int]]()
    for epoch in range(-(-steps * batch // rows)):
        expected += reference_epoch(shard_rows, group, seed, batch, epoch, steps * batch - epoch * rows)
    assert batches(order, steps) == expected


@given(sizes, groups, seeds, st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 10**6))
def test_shares_of_all_ranks_are_the_batch(
    shard_rows: list[int], group: int, seed: int, each: int, world: int, step: int
) -> None:
    """Any step may be asked for first, so a resumed training sees what an unbroken one would have."""
    order = TrainingOrder(shard_rows, group, seed, 4 * each)
    shares = [TrainingOrder(shard_rows, group, seed, 4 * each).share(step, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == order.batch(step)


@given(sizes, groups, seeds)
def test_every_row_comes_once_in_each_epoch(shard_rows: list[int], group: int, seed: int) -> None:
    order = TrainingOrder(shard_rows, group, seed, order_rows := sum(shard_rows))
    assert order.rows_per_epoch == order_rows
    everything = Counter((shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows))
    for epoch in range(6):  # more epochs than are remembered
        assert Counter(order.batch(epoch)) == everything
    assert Counter(order.batch(0)) == everything


def test_epochs_and_seeds_differ() -> None:
    order, other = TrainingOrder([50] * 20, 16, 3, 1000), TrainingOrder([50] * 20, 16, 4, 1000)
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


@given(sizes, groups, seeds, st.integers(1, 8), st.integers(1, 40))
def test_shards_until_is_what_the_steps_touch(shard_rows: list[int], group: int, seed: int, batch: int, steps: int) -> None:
    """A training demands the shards that it touches and no other, and a longer one these and more."""
    order = TrainingOrder(shard_rows, group, seed, batch, steps)
    demanded = order.shards_until(steps)
    assert set(demanded) == {shard for shard, _ in batches(order, steps)} and len(set(demanded)) == len(demanded)
    assert TrainingOrder(shard_rows, group, seed, batch, steps + 7).shards_until(steps + 7)[: len(demanded)] == demanded
    for step in range(steps):
        assert {shard for shard, _ in order.batch(step)} <= set(demanded[: order.shard_count_until(step + 1)])
    assert order.shard_count_until(0) == 0


def test_training_begins_with_a_single_batch() -> None:
    """Windows that are as long as a group from the start would make the first step wait for 16 batches."""
    order = TrainingOrder([16] * 100, 16, 0, 16)
    assert [order.shard_count_until(step) for step in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [1, 2, 4, 4, 8, 8, 16, 16, 32]


@pytest.mark.parametrize(("ranks", "each"), [(1000, 4), (500, 8), (4000, 1), (7, 3)])
def test_a_rank_decodes_what_it_uses(ranks: int, each: int, seed: int) -> None:
    """Rows of the groups that ranks touch while they keep but those of the last steps, over the rows that they use."""
    batch, group = ranks * each, 16
    order = TrainingOrder([5120, 4880, 333] * (batch // 8 + 1), group, seed, batch)
    decoded = used = 0
    for rank in (0, ranks // 3, ranks - 1):
        kept: set[tuple[int, int]] = set()
        for step in range(order.rows_per_epoch // batch):
            groups = {(shard, row // group) for shard, row in order.share(step, rank, ranks)}
            decoded += group * len(groups - kept)
            used, kept = used + each, groups
    assert decoded / used <= 1.1
    assert decoded / used >= 1, "a group is decoded once for all its rows"


GOLDEN_SHUFFLE = [1, 4, 5, 13, 11, 7, 6, 15, 9, 12, 0, 10, 3, 14, 2, 8]
GOLDEN_BATCHES = [
    [(3, 0), (3, 1), (3, 2), (3, 3)],
    [(2, 1), (2, 0), (0, 0), (0, 1)],
    [(1, 1), (1, 3), (0, 2), (1, 4)],
    [(1, 0), (1, 2), (0, 0), (0, 1)],
    [(1, 0), (1, 1), (1, 2), (1, 4)],
]


def test_golden_values() -> None:
    """Pinned: another order under the same seed would break every checkpoint and every demand on a label log."""
    assert shuffled(16, 0).tolist() == GOLDEN_SHUFFLE
    order = TrainingOrder([3, 5, 2, 4], 2, 7, 4)
    assert [order.batch(step) for step in (0, 1, 2, 3, 1000)] == GOLDEN_BATCHES


@pytest.mark.parametrize("shard_rows", [[0], [3, 0]])
def test_an_empty_shard_is_a_bug(shard_rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        TrainingOrder(shard_rows, 16, 0, 1)
