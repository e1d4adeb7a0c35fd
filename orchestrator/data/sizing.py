"""Sizes of the parts of a corpus: pieces packed by one task, shards that are labelled together, and their row groups.

All of it follows from the job's `data` section and from how much text there is, both known before anything is packed, so
the same corpus becomes the same shards wherever it is packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from orchestrator.spec.data import Data

BYTES_PER_TOKEN = 4
"""About this for English and for code."""
SMALL_SHARD_ROWS, FEWEST_SHARDS = 64, 8
"""Small enough that labels come soon and a kill loses little; of a tiny corpus smaller, so that there are some to follow."""
SHARDS = 4096
"""A corpus has about so many, until they become too large: enough for every teacher replica to have work to the end, and few
enough to look at each."""
LARGE_SHARD_TOKENS = 24 << 20
"""At most. A piece is cut evenly, so shards are a tenth smaller on average, and 10T tokens make 450,000."""
PIECE_SHARDS = 4
PIECE_BYTES, PIECE_ROWS = 16 << 20, 16_384
"""Size of a piece of a small corpus, in bytes or in rows, whichever its source tells beforehand; a larger corpus has pieces of
a multiple of it, as its shards need."""


@dataclass(frozen=True)
class PieceSize:
    """The amount of a corpus that one task packs."""

    bytes: int
    rows: int
    """Rows of the source, where these are what it tells beforehand."""


def group_rows(data: Data) -> int:
    """Rows of a row group; a shard has at least one."""
    return min(data.rows_per_group, data.rows_per_shard or data.rows_per_group)


def shard_rows(data: Data, corpus_bytes: int) -> int:
    """The most rows of a shard of a corpus with about `corpus_bytes` of text: whole row groups."""
    group = group_rows(data)
    if data.rows_per_shard is not None:
        return data.rows_per_shard // group * group
    rows = corpus_bytes // BYTES_PER_TOKEN // data.seq_len
    small = min(SMALL_SHARD_ROWS, rows // FEWEST_SHARDS)
    wanted = min(max(small, rows // SHARDS), LARGE_SHARD_TOKENS // data.seq_len)
    return max(1, wanted // group) * group


def piece_size(data: Data, corpus_bytes: int) -> PieceSize:
    """The size of a piece of a corpus with about `corpus_bytes` of text: several shards, for each piece ends with a shard that
    is not full."""
    needed = PIECE_SHARDS * shard_rows(data, corpus_bytes) * data.seq_len * BYTES_PER_TOKEN
    times = -(-max(PIECE_BYTES, needed) // PIECE_BYTES)
    return PieceSize(times * PIECE_BYTES, times * PIECE_ROWS)


def cut_evenly(rows: int, most: int, group: int) -> list[slice]:
    """Cut a piece of so many `rows` into as few shards of at most `most` rows as there can be, all of about the same number of
    whole groups."""
    groups = -(-rows // group)
    shards = -(-groups * group // most)
    if not rows:
        return []
    ends = [min(rows, groups * shard // shards * group) for shard in range(shards + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
