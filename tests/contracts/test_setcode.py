"""Packed sets: what was packed comes back, near the entropy, and damaged bytes raise or show."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.labels.setcode import COLUMNS, decode_sets, encode_sets, entropy_bound
from orchestrator.store.row_groups import to_parquet

GEMMA = 1 << 18
FACTOR = 1.15
"""A full shard's Parquet file over the order-0 entropy of its sets; the code takes 1.12 of it, the table included."""


class Sets(NamedTuple):
    unique: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    samples: int
    vocab: int

    @property
    def seq(self) -> int:
        return self.unique.shape[1]


def pick_ids(rng: np.random.Generator, spread: str, size: int, vocab: int) -> np.ndarray:
    """`size` distinct ids below `vocab`, ascending."""
    if spread == "adjacent":
        return rng.integers(vocab - size + 1) + np.arange(size)
    if spread == "ends":
        return np.concatenate([np.arange(size - size // 2), np.arange(vocab - size // 2, vocab)])
    pool = min(vocab, 2 * size) if spread == "few" else vocab
    ids = np.unique(rng.integers(pool, size=3 * size))
    return np.sort(rng.permutation(ids)[:size]) if len(ids) >= size else np.arange(size)


def pick_counts(rng: np.random.Generator, spread: str, size: int, samples: int) -> np.ndarray:
    """`size` positive counts that sum to `samples`."""
    if spread == "one":
        shares = np.eye(size)[rng.integers(size)]
    else:
        shares = np.full(size, 1 / size) if spread == "even" else rng.dirichlet(np.full(size, 0.2))
    return 1 + rng.multinomial(samples - size, shares)


@st.composite
def sets(draw: st.DrawFn) -> Sets:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 8, 30]))
    samples = draw(st.sampled_from([1, 2, 3, 50, 255]) | st.integers(1, 255))
    vocab = draw(st.sampled_from([1, 2, 255, 256, 257, 4096, GEMMA, GEMMA + 1, 1 << 24]))
    most = min(samples, vocab)
    unique = {
        "any": rng.integers(1, most + 1, shape),
        "one": np.ones(shape, dtype=np.int64),
        "most": np.full(shape, most),
    }[draw(st.sampled_from(["any", "one", "most"]))]
    spread_ids = draw(st.sampled_from(["even", "few", "adjacent", "ends"]))
    spread_counts = draw(st.sampled_from(["even", "uneven", "one"]))
    ids = [pick_ids(rng, spread_ids, u, vocab) for u in unique.flat]
    counts = [pick_counts(rng, spread_counts, u, samples) for u in unique.flat]
    return Sets(unique, np.concatenate(ids), np.concatenate(counts), samples, vocab)


def drawn(seed: int, rows: int, seq: int, vocab: int, samples: int = 50) -> Sets:
    """Systematic draws from distributions of changing sharpness over ids of Zipf-like frequency."""
    rng = np.random.default_rng(seed)
    frequency = 1 / (np.arange(vocab) + 3.0)
    cdf = np.cumsum(frequency[rng.permutation(vocab)])
    unique, ids, counts = [], [], []
    for sharp in rng.beta(1, 1, rows * seq):
        top = np.searchsorted(cdf, rng.random() * cdf[-1], side="right")
        points = np.maximum(0, (np.arange(samples) + rng.random()) / samples - sharp) / (1 - sharp)
        soft = np.searchsorted(cdf, points * cdf[-1], side="right")
        one = np.unique(np.where(points > 0, soft, top), return_counts=True)
        unique.append(len(one[0]))
        ids.append(one[0])
        counts.append(one[1])
    return Sets(np.array(unique).reshape(rows, seq), np.concatenate(ids), np.concatenate(counts), samples, vocab)


def encoded(some: Sets) -> dict[str, list[bytes]]:
    return encode_sets(some.unique, some.ids, some.counts, some.samples, some.vocab)


def decoded(columns: dict[str, list[bytes]], some: Sets) -> tuple[np.ndarray, ...]:
    return decode_sets(columns, some.samples, some.vocab, some.seq)


def same(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@given(sets())
@settings(max_examples=300)
def test_what_was_packed_comes_back(some: Sets) -> None:
    columns = encoded(some)
    assert tuple(columns) == COLUMNS and all(len(values) == len(some.unique) for values in columns.values())
    assert same(decoded(columns, some), some[:3])


def test_a_full_shard_comes_back_and_packs_alike(seed: int) -> None:
    some = drawn(seed, 64, 256, GEMMA)
    columns = encoded(some)
    assert same(decoded(columns, some), some[:3])
    narrow = Sets(some.unique.astype(np.uint8), some.ids.astype(np.uint32), some.counts.astype(np.uint8), *some[3:])
    assert encoded(narrow) == columns


def test_rows_are_read_alone_when_the_table_is_at_hand(seed: int) -> None:
    some = drawn(seed, 6, 32, 4096)
    columns = encoded(some)
    row = np.repeat(np.arange(6), some.unique.sum(1))
    for chosen in ([3], [5, 0, 2]):
        part = {name: [values[r] for r in chosen] for name, values in columns.items()} | {"table": columns["table"]}
        at = np.concatenate([np.flatnonzero(row == r) for r in chosen])
        assert same(decoded(part, some), (some.unique[chosen], some.ids[at], some.counts[at]))


def test_size_is_near_the_entropy(seed: int) -> None:
    some = drawn(seed, 64, 256, GEMMA)
    bound = sum(entropy_bound(*some[:3]).values()) * some.unique.size
    table = pa.table({name: pa.array(values, pa.binary()) for name, values in encoded(some).items()})
    stored = len(to_parquet([table])[0])
    plain = len(some.ids) * 4 + some.unique.size
    assert bound < stored < FACTOR * bound < plain, f"{stored / bound:.3f} of the bound, {plain / bound:.3f} unpacked"


def test_the_bound_is_the_entropy() -> None:
    counts = np.tile([3, 1], 256)
    ids = np.stack([np.arange(256), 256 + np.arange(256)], axis=1).reshape(-1)
    bound = entropy_bound(np.full((4, 64), 2), ids, counts)
    assert bound == pytest.approx({"unique": 0, "ids": (2 * 9 - 1) / 8, "counts": 1 / 8})


GOLDEN = {
    "table": "6899469801289e00",
    "sizes": "85e85d3152cb1b03",
    "sets": "69af44ca05cfc242",
    "counts": "d252e151da5c2b59",
}


def test_golden_bytes() -> None:
    """Pinned: a shard must pack to the same bytes whoever packs it, and those of a log must stay readable."""
    unique = 1 + np.arange(96) % 15
    ids = [np.unique((7919 * position + 31 * np.arange(u) ** 2) % 1000) for position, u in enumerate(unique)]
    counts = [np.roll(np.diff(255 * np.arange(u + 1) ** 2 // u**2), position) for position, u in enumerate(unique)]
    some = Sets(unique.reshape(4, 24), np.concatenate(ids), np.concatenate(counts), 255, 1000)
    columns = encoded(some)
    assert same(decoded(columns, some), some[:3])
    assert {name: hashlib.sha256(b"".join(values)).hexdigest()[:16] for name, values in columns.items()} == GOLDEN


# Damage.


def test_a_flipped_byte_raises_or_shows(seed: int) -> None:
    some = drawn(seed, 3, 16, 4096)
    columns = encoded(some)
    noticed = shown = 0
    for name in COLUMNS:
        for row, value in enumerate(columns[name]):
            for at in range(len(value)):
                flipped = value[:at] + bytes([value[at] ^ 255]) + value[at + 1 :]
                values = [*columns[name][:row], flipped, *columns[name][row + 1 :]]
                try:
                    assert not same(decoded(columns | {name: values}, some), some[:3]), (name, row, at)
                    shown += 1
                except ValueError:
                    noticed += 1
    assert noticed > shown > 0


@given(sets(), st.data())
@settings(max_examples=200)
def test_any_bytes_raise_value_error_or_decode(some: Sets, data: st.DataObject) -> None:
    columns = encoded(some)
    name = data.draw(st.sampled_from(COLUMNS))
    row = data.draw(st.integers(0, len(some.unique) - 1))
    value = columns[name][row]
    cut = data.draw(st.integers(0, len(value)))
    columns[name][row] = value[:cut] + data.draw(st.binary(max_size=80)) + value[data.draw(st.integers(cut, len(value))) :]
    try:
        unique, ids, counts = decoded(columns, some)
    except ValueError:
        return
    encode_sets(unique, ids, counts, some.samples, some.vocab)


@pytest.mark.parametrize(
    "change",
    [
        {"unique": np.array([[2, 2, 0]])},
        {"unique": np.array([[2, 2, 1]])},
        {"ids": np.array([1, 5, 5, 5])},
        {"ids": np.array([5, 1, 2, 3])},
        {"ids": np.array([1, 5, 2, 10])},
        {"ids": np.array([-1, 5, 2, 3])},
        {"counts": np.array([3, 1, 2, 3])},
        {"counts": np.array([4, 0, 2, 2])},
        {"samples": 256},
    ],
)
def test_what_could_not_come_back_is_refused(change: dict[str, Any]) -> None:
    some = Sets(np.array([[2, 2]]), np.array([1, 5, 2, 3]), np.array([3, 1, 2, 2]), 4, 10)
    assert same(decoded(encoded(some), some), some[:3])
    with pytest.raises(ValueError):
        encoded(some._replace(**change))
