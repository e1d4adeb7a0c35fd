"""Sets of token ids with multiplicities, packed: for every position which ids were drawn, and how often.

Ids. A shard's ids fall into classes by how often they occur in it, powers of two apart; a table, kept once per shard,
lists the ids of each class. In a row, a class's occurrences are a set of cells of the grid ids x positions. They lie
close to evenly there, so Rice codes of the gaps between them come near the entropy (0.15 bits an id on Gemma's), and no
order inside a position is paid for. Ids that occur once are not in the table: their grid is the whole vocabulary's.

Counts. They sum to N, so the first largest of a position is left out and only its place kept. What the others exceed 1
by is unary, all first bits of a row before all second ones: bytes of unlike frequency, left to Parquet's zstd.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The numpy stubs leave types open.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

ID_COLUMNS = ("table", "sizes", "sets")
COLUMNS = (*ID_COLUMNS, "counts")
"""Columns that `encode_ids` and `encode_sets` return. Only a shard's first row has any bytes in `table`; `sizes` holds the
sizes of the classes in a row, `sets` their gaps."""

CLASSES = 16
"""Class c has the ids that occur 2^c to 2^(c+1) - 1 times in the shard, the last also all beyond."""
LEVELS = 4
"""Unary bits of a count before the rest of it becomes a byte."""
WINDOW = 8
"""Bytes in which a field of up to 56 bits lies wherever it starts."""


def encode_sets(unique: Ints, ids: Ints, counts: Ints, samples: int, vocab_size: int) -> dict[str, list[bytes]]:
    """One bytes value per row, by column.

    `unique` [rows, seq] is how many ids a position has; `ids` [sum of unique], ascending in each position, and `counts`,
    alike, run over all positions. A position's counts sum to `samples`. Raises `ValueError` if they do not.
    """
    columns = encode_ids(unique, ids, vocab_size)
    each = unique.reshape(-1).astype(np.int64)
    first = np.cumsum(each) - each
    if counts.size != ids.size or counts.min() < 1 or np.any(np.add.reduceat(counts, first) != samples):
        raise ValueError(f"sets to pack: counts must be positive and sum to {samples} in each position")
    return columns | {"counts": _encode_counts(unique, counts.astype(np.int64))}


def decode_sets(columns: dict[str, list[bytes]], samples: int, vocab_size: int, seq: int) -> tuple[Ints, Ints, Ints]:
    """`unique` [rows, seq], `ids` and `counts` as given to `encode_sets`; raises `ValueError` for bytes it never gives.

    The rows may be any of one shard, if the table is among them.
    """
    unique, ids = decode_ids(columns, vocab_size, seq)
    if unique.max() > samples:
        raise ValueError("packed sets: a position with too many ids")
    return unique, ids, _decode_counts(columns["counts"], unique, samples)


def encode_ids(unique: Ints, ids: Ints, vocab_size: int) -> dict[str, list[bytes]]:
    """The columns of the sets alone; arguments as for `encode_sets`."""
    rows, seq = unique.shape
    each, ids = unique.reshape(-1).astype(np.int64), ids.astype(np.int64)
    _check(each, ids, vocab_size)
    tabled, listed, known, its_class, number = _tabulate(ids)
    shift = (vocab_size * seq - 1).bit_length()
    cell = np.zeros(vocab_size, dtype=np.int64)
    cell[known] = (its_class << shift) + number * seq
    row, place = np.repeat(np.arange(rows), each.reshape(rows, seq).sum(1)), np.repeat(np.tile(np.arange(seq), rows), each)
    key = np.sort((row * CLASSES << shift) + cell[ids] + place)
    sizes = np.bincount(key >> shift, minlength=rows * CLASSES).reshape(rows, CLASSES)
    table = _encode_sizes(listed[None])[0] + _encode_gaps(tabled, listed[None], np.full(CLASSES, vocab_size))[0]
    return {
        "table": [table] + [b""] * (rows - 1),
        "sizes": _encode_sizes(sizes),
        "sets": _encode_gaps(key & ((1 << shift) - 1), sizes, _grids(listed, vocab_size, seq)),
    }


def decode_ids(columns: dict[str, list[bytes]], vocab_size: int, seq: int) -> tuple[Ints, Ints]:
    """`unique` [rows, seq] and `ids` as given to `encode_ids`; raises `ValueError` for bytes it never gives."""
    rows = len(columns["sets"])
    table = b"".join(columns["table"])
    listed = _decode_sizes([table[: 4 * CLASSES]])
    tabled = _decode_gaps([table[4 * CLASSES :]], listed, np.full(CLASSES, vocab_size))
    sizes = _decode_sizes(columns["sizes"])
    if len(sizes) != rows:
        raise ValueError("packed sets: the columns differ in rows")
    cell = _decode_gaps(columns["sets"], sizes, _grids(listed[0], vocab_size, seq))
    number, place = np.divmod(cell, seq)
    of_class = np.repeat(np.tile(np.arange(CLASSES), rows), sizes.reshape(-1))
    common = of_class > 0
    number[common] = tabled[(np.cumsum(listed[0]) - listed[0])[of_class[common]] + number[common]]
    shift = (vocab_size - 1).bit_length()
    key = np.sort((np.repeat(np.arange(rows) * seq, sizes.sum(1)) + place) << shift | number)
    if np.any(key[1:] == key[:-1]):
        raise ValueError("packed sets: an id occurs twice in a position")
    unique = np.bincount(key >> shift, minlength=rows * seq).reshape(rows, seq)
    if unique.size == 0 or unique.min() < 1:
        raise ValueError("packed sets: a position without ids")
    return unique, key & ((1 << shift) - 1)


def entropy_bound(unique: Ints, ids: Ints, counts: Ints) -> dict[str, float]:
    """Bytes per position of an ideal order-0 code of the same data, which is told all frequencies.

    `unique`: their entropy. `ids`: by their frequency, less log2(u!) as a set has no order. `counts`: the place of the
    first largest, log2(u), and the entropy of the others.
    """
    each, counts = unique.reshape(-1).astype(np.int64), counts.astype(np.int64)
    order = np.array([math.lgamma(u + 1) / math.log(2) for u in range(int(each.max()) + 1)])[each].sum()
    light = np.delete(counts, np.cumsum(each) - each + _heavy(each, counts))
    bits = {
        "unique": _entropy(each),
        "ids": _entropy(ids) - order,
        "counts": _entropy(light) + np.log2(each).sum(),
    }
    return {name: float(value) / 8 / each.size for name, value in bits.items()}


def _check(each: Ints, ids: Ints, vocab_size: int) -> None:
    if each.size == 0 or each.min() < 1 or each.sum() != ids.size:
        raise ValueError("sets to pack: no positions, a position without ids, or not as many ids as the positions say")
    rising = np.diff(ids, prepend=-1) > 0
    rising[np.cumsum(each) - each] = True
    if not rising.all() or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError("sets to pack: ids must ascend in each position and lie in the vocabulary")


def _tabulate(ids: Ints) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """The table, as ids ascending in each class and how many each class has; the ids that occur, with class and number.

    The number is the place in the class's part of the table; in class 0, which the table leaves out, the id itself.
    """
    often = np.bincount(ids)
    known = np.flatnonzero(often)
    its_class = np.minimum(_bit_length(often[known]) - 1, CLASSES - 1)
    listed = np.bincount(its_class, minlength=CLASSES)
    order = np.argsort(its_class, kind="stable")
    number = np.empty_like(known)
    number[order] = np.where(its_class[order] == 0, known[order], _runs(listed))
    tabled = known[order[listed[0] :]]
    listed[0] = 0
    return tabled, listed, known, its_class, number


def _grids(listed: Ints, vocab_size: int, seq: int) -> Ints:
    """Cells of each class's grid in a row; `listed` is how many ids the table has of each class."""
    grids = listed * seq
    grids[0] = vocab_size * seq
    return grids


# Sets of integers as Rice codes of gaps.


def _encode_sizes(sizes: Ints) -> list[bytes]:
    """`sizes` [rows, classes], each row's lowest bytes first: mostly zeros after them."""
    raw = sizes.astype("<u4").view(np.uint8).reshape(len(sizes), CLASSES, 4)
    return [row.T.tobytes() for row in raw]


def _decode_sizes(blobs: Sequence[bytes]) -> Ints:
    if any(len(blob) != 4 * CLASSES for blob in blobs):
        raise ValueError("packed sets: sizes of the wrong length")
    raw = np.frombuffer(b"".join(blobs), dtype=np.uint8).reshape(-1, 4, CLASSES)
    return np.ascontiguousarray(raw.transpose(0, 2, 1)).view("<u4").reshape(-1, CLASSES).astype(np.int64)


def _shifts(sizes: Ints, universe: Ints) -> Ints:
    """Low bits of a gap that are stored as they are, [rows, classes]: the best for geometric gaps (Kiely 2004)."""
    return np.maximum(_bit_length(universe * 77 // (80 * np.maximum(sizes, 1))) - 1, 0)


def _encode_gaps(values: Ints, sizes: Ints, universe: Ints) -> list[bytes]:
    """`values`, ascending inside each of [rows, classes] sets of `sizes`, each below its class's `universe`.

    A row's bytes: the low bits of all gaps, then the rest in unary.
    """
    flat, per_row = sizes.reshape(-1), sizes.sum(1)
    shift = np.repeat(_shifts(sizes, universe).reshape(-1), flat)
    gaps = np.diff(values, prepend=0) - 1
    first = (np.cumsum(flat) - flat)[flat > 0]
    gaps[first] = values[first]
    lows = _encode_fields(gaps, shift, per_row)
    lengths = (gaps >> shift) + 1
    base, size = _bytes_of(_row_sums(lengths, per_row))
    return [low + high for low, high in zip(lows, _bits(_places(lengths, per_row, base) + lengths - 1, size), strict=True)]


def _decode_gaps(blobs: Sequence[bytes], sizes: Ints, universe: Ints) -> Ints:
    flat, per_row = sizes.reshape(-1), sizes.sum(1)
    length = _lengths(blobs)
    if np.any(per_row > 8 * length):
        raise ValueError("packed sets: sizes exceed the bytes")
    shift = np.repeat(_shifts(sizes, universe).reshape(-1), flat)
    start = np.cumsum(length) - length
    lows = -(-_row_sums(shift, per_row) // 8)
    if np.any(lows > length):
        raise ValueError("packed sets: the bytes end early")
    low = _decode_fields(_joined(blobs), shift, per_row, 8 * start)
    tails = [blob[at:] for blob, at in zip(blobs, lows.tolist(), strict=True)]
    ends = np.flatnonzero(np.unpackbits(_joined(tails), bitorder="little"))
    base = 8 * (np.cumsum(length - lows) - (length - lows))
    if ends.size != shift.size or np.any(np.searchsorted(ends, base) != np.cumsum(per_row) - per_row):
        raise ValueError("packed sets: not as many gaps as the sizes say")
    high = np.diff(ends, prepend=0) - 1
    begins = (np.cumsum(per_row) - per_row)[per_row > 0]
    high[begins] = ends[begins] - base[per_row > 0]
    limit = np.repeat(np.tile(universe, len(sizes)), flat)
    if np.any(high > limit >> shift):
        raise ValueError("packed sets: a gap beyond the universe")
    gaps = (high << shift) + low
    values = _places(gaps + 1, flat, np.zeros_like(flat)) + gaps
    if np.any(values >= limit):
        raise ValueError("packed sets: a value beyond the universe")
    return values


# Counts.


def _heavy(each: Ints, counts: Ints) -> Ints:
    """Return the index, within each position, of its first largest count, [positions]."""
    first = np.cumsum(each) - each
    largest = np.repeat(np.maximum.reduceat(counts, first), each)
    return np.minimum.reduceat(np.where(counts == largest, _runs(each), counts.size), first)


def _light(each: Ints, heavy: Ints) -> npt.NDArray[np.bool_]:
    """Which counts are stored: all but the largest of each position."""
    light = np.ones(int(each.sum()), dtype=bool)
    light[np.cumsum(each) - each + heavy] = False
    return light


def _encode_counts(unique: Ints, counts: Ints) -> list[bytes]:
    """Per row the places of the largest counts, in as many bits as `unique` [rows, seq] asks for, then the others."""
    rows, seq = unique.shape
    each = unique.reshape(-1).astype(np.int64)
    heavy = _heavy(each, counts)
    places = _encode_fields(heavy, _bit_length(each - 1), np.full(rows, seq))
    light = _light(each, heavy)
    over = counts[light] - 1
    row = np.repeat(np.arange(rows), each.reshape(rows, seq).sum(1) - seq)
    more: list[npt.NDArray[np.bool_]] = []
    per_row: list[Ints] = []
    for _ in range(LEVELS):
        more.append(over > 0)
        per_row.append(np.bincount(row, minlength=rows))
        row, over = row[more[-1]], over[more[-1]] - 1
    base, size = _bytes_of(np.sum(per_row, axis=0))
    ones: list[Ints] = []
    for bits, here in zip(more, per_row, strict=True):
        ones.append((_runs(here) + np.repeat(base, here))[bits])
        base = base + here
    rest = _split(over.astype(np.uint8), np.bincount(row, minlength=rows))
    return [b"".join(parts) for parts in zip(places, _bits(np.concatenate(ones), size), rest, strict=True)]


def _decode_counts(blobs: Sequence[bytes], unique: Ints, samples: int) -> Ints:
    rows, seq = unique.shape
    each = unique.reshape(-1)
    width = _bit_length(each - 1)
    per_row = np.full(rows, seq)
    length, places = _lengths(blobs), -(-_row_sums(width, per_row) // 8)
    if len(blobs) != rows or np.any(places > length):
        raise ValueError("packed sets: places of largest counts of the wrong length")
    heavy = _decode_fields(_joined(blobs), width, per_row, 8 * (np.cumsum(length) - length))
    if np.any(heavy >= each):
        raise ValueError("packed sets: place of a largest count beyond its position")
    light = _light(each, heavy)
    counts = np.zeros(light.size, dtype=np.int64)
    others = [blob[at:] for blob, at in zip(blobs, places.tolist(), strict=True)]
    counts[light] = 1 + _decode_over(others, unique.sum(1) - seq)
    first = np.cumsum(each) - each
    largest = samples - np.add.reduceat(counts, first)
    if largest.min() < 1:
        raise ValueError(f"packed sets: counts beyond {samples}")
    counts[first + heavy] = largest
    return counts


def _decode_over(blobs: Sequence[bytes], per_row: Ints) -> Ints:
    """Return the amounts by which the stored counts exceed 1, `per_row` of them in each row."""
    length = _lengths(blobs)
    start = np.cumsum(length) - length
    raw = _joined(blobs)
    bits = np.unpackbits(raw, bitorder="little").view(bool)
    row = np.repeat(np.arange(len(blobs)), per_row)
    alive = np.arange(row.size)
    over = np.zeros(row.size, dtype=np.int64)
    base = 8 * start
    for _ in range(LEVELS):
        here = np.bincount(row[alive], minlength=len(blobs))
        if np.any(base + here > 8 * (start + length)):
            raise ValueError("packed sets: counts end early")
        alive = alive[bits[_places(np.ones_like(alive), here, base)]]
        over[alive] += 1
        base = base + here
    left = np.bincount(row[alive], minlength=len(blobs))
    base = -(-base // 8)
    if np.any(base + left != start + length):
        raise ValueError("packed sets: counts of the wrong length")
    over[alive] += raw[_places(np.ones_like(alive), left, base)]
    return over


# Bits in rows of whole bytes, the lowest first.


def _bit_length(values: Ints) -> Ints:
    """Return the bit lengths of integers below 2^53."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _runs(lengths: Ints) -> Ints:
    """0 to n - 1 for each n of `lengths`."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _row_sums(lengths: Ints, per_row: Ints) -> Ints:
    """Sums of `lengths`, `per_row` of them to a row: [rows]."""
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.cumsum(per_row)
    return total[ends] - total[ends - per_row]


def _places(lengths: Ints, per_row: Ints, base: Ints) -> Ints:
    """Return the start offsets of items of `lengths`, when those of a row follow one another from its `base` on."""
    first = np.concatenate([[0], np.cumsum(lengths)])
    return first[:-1] + np.repeat(base - first[np.cumsum(per_row) - per_row], per_row)


def _bytes_of(bits: Ints) -> tuple[Ints, Ints]:
    """The first bit and the bytes of each row, when a row of `bits` starts at a byte."""
    size = -(-bits // 8)
    return 8 * (np.cumsum(size) - size), size


def _bits(ones: Ints, size: Ints) -> list[bytes]:
    """Rows of `size` bytes with the bits at `ones` set."""
    bits = np.zeros(8 * int(size.sum()), dtype=np.uint8)
    bits[ones] = 1
    return _split(np.packbits(bits, bitorder="little"), size)


def _encode_fields(values: Ints, width: Ints, per_row: Ints) -> list[bytes]:
    """The lowest `width` bits of `values`, at most 56, `per_row` of them to a row."""
    base, size = _bytes_of(_row_sums(width, per_row))
    start = _places(width, per_row, base)
    word, offset = start >> 6, start & 63
    field = (values & ((1 << width) - 1)).view(np.uint64)
    words = np.zeros(int(size.sum()) // 8 + 2, dtype="<u8")
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] = np.bitwise_or.reduceat(field << offset.view(np.uint64), first)
    cut = np.flatnonzero(offset + width > 64)  # at most one field crosses the end of a word
    words[word[cut] + 1] |= field[cut] >> (64 - offset[cut]).view(np.uint64)
    return _split(words.view(np.uint8)[: int(size.sum())], size)


def _decode_fields(raw: Bytes, width: Ints, per_row: Ints, base: Ints) -> Ints:
    """The fields of `width` bits that start at bits `base` of `raw` and follow one another in a row."""
    start = _places(width, per_row, base)
    window = np.lib.stride_tricks.sliding_window_view(raw, WINDOW)[start >> 3].view("<u8").reshape(-1)
    return (window >> (start & 7).astype(np.uint64)).astype(np.int64) & ((1 << width) - 1)


def _joined(blobs: Sequence[bytes]) -> Bytes:
    """All bytes, and a window's more for the last field."""
    return np.frombuffer(b"".join(blobs) + bytes(WINDOW), dtype=np.uint8)


def _lengths(blobs: Sequence[bytes]) -> Ints:
    return np.array([len(blob) for blob in blobs], dtype=np.int64)


def _split(raw: Bytes, size: Ints) -> list[bytes]:
    ends = np.cumsum(size).tolist()
    data = raw.tobytes()
    return [data[end - length : end] for end, length in zip(ends, size.tolist(), strict=True)]


def _entropy(values: Ints) -> float:
    """Bits of `values` in a code by their own frequencies."""
    often = np.unique(values, return_counts=True)[1]
    return float((often * np.log2(values.size / often)).sum())
