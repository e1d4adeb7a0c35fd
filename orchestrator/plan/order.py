"""The training order: which rows make up global batch s, a pure function of (shard sizes, rows of a group, steps, seed, s).

Nothing about workers enters, so 1, 2 or 64 of them see the same batches, and a checkpoint needs to store only the
step. Two layers:

The *stream* of an epoch is every row once: shards in an order drawn per epoch, the row groups of a shard, and the rows of a
group, in orders drawn per epoch and shard, or group; the data stage has already spread the documents over the shards. Groups
that are shorter than others, the ends of shards, come after all whole ones.

A *window* lays a piece of the stream over several steps, place after place: the first place of the batch takes the next rows of
the stream for all steps of the window, then the second, and so on. A window has as many steps as a group has rows, so every
place of the batch is served by one group, row after row, and whoever trains on some places decodes no row that it does not
use, however few they are. The first windows of an epoch are short, 1, 1, 2, 4, ... steps, so that training can begin when a
single batch is labelled. Windows end where the epoch and where the training ends: the first s·B rows of the stream are
what a training of s steps sees, so a longer one needs the same labels and more.

Randomness is a counter hash (splitmix64, Steele et al. 2014) and not a library's generator, whose stream may change with its
version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

EPOCHS_KEPT = 2
GROUPS_KEPT = 4096
"""At least; of a larger batch those that its places use."""


def shuffled(n: int, *key: int) -> Indices:
    """A permutation of range(n), [n], decided by `key` alone."""
    return np.argsort(_mix(np.arange(n, dtype=np.uint64), key), kind="stable").astype(np.int64)


def _mix(counter: npt.NDArray[np.uint64], key: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    state = np.zeros_like(counter)
    with np.errstate(over="ignore"):
        for word in (*(np.uint64(k) for k in key), counter):
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


class Row(NamedTuple):
    """The position of a row: its shard, and its index in it."""

    shard: int
    row: int


@dataclass(frozen=True)
class _Epoch:
    """The stream of one epoch: runs of rows, each of one shard."""

    shards: Indices
    """[runs]"""
    first_rows: Indices
    """[runs]: the row of the shard that the run begins with, before rows are permuted."""
    starts: Indices
    """[runs]: where in the stream it begins."""


class TrainingOrder:
    """Rows of every global batch, as (shard, row) pairs.

    `shard_rows[i]` is the number of rows in token shard i, of which `group_rows` make a row group. A batch may straddle two
    epochs: no row is ever dropped. `steps` is where training ends; without it, it never does.
    """

    def __init__(
        self, shard_rows: Sequence[int] | Indices, group_rows: int, seed: int, global_batch: int, steps: int | None = None
    ) -> None:
        self._rows = np.asarray(shard_rows, dtype=np.int64)
        self._group = group_rows
        self._seed = seed
        self._global_batch = global_batch
        self._end = None if steps is None else steps * global_batch
        self.rows_per_epoch = int(self._rows.sum())
        assert self._rows.min() > 0
        self._epoch = lru_cache(EPOCHS_KEPT)(self._make_epoch)
        kept = max(GROUPS_KEPT, 2 * global_batch)
        self._groups_of = lru_cache(kept)(self._permuted_groups)
        self._rows_of = lru_cache(kept)(self._permuted_rows)

    def batch(self, step: int) -> list[Row]:
        """The `global_batch` rows of `step`, in order."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world: int) -> list[Row]:
        """The rows of `step` that data-parallel `rank` of `world` trains on: a contiguous slice, so few groups."""
        each = self._global_batch // world
        first = step * self._global_batch + rank * each
        return [self._at(position) for position in range(first, first + each)]

    def shards_until(self, steps: int) -> list[int]:
        """Every shard that the first `steps` steps may touch, once, in the order of its first use."""
        return self._first_use[0][: self.shard_count_until(steps)].tolist()

    def shard_count_until(self, steps: int) -> int:
        """Return how many shards the first `steps` steps may touch: those of all windows that these begin."""
        if steps == 0:
            return 0
        last = steps * self._global_batch - 1
        epoch, offset = divmod(last, self.rows_per_epoch)
        if epoch:
            return len(self._rows)
        start, length = self._window(0, offset)
        return int(np.searchsorted(self._first_use[1], start + length, side="left"))

    def _window(self, epoch: int, offset: int) -> tuple[int, int]:
        """Return where in the stream of `epoch` the window of position `offset` begins, and how many rows it has."""
        batch, step = self._global_batch, offset // self._global_batch
        if step < self._group:
            first = step and 1 << (step.bit_length() - 1)
            steps = max(1, min(first, self._group - first))
        else:
            first, steps = step - step % self._group, self._group
        end = self.rows_per_epoch
        if self._end is not None:
            end = min(end, self._end - epoch * self.rows_per_epoch)
        assert offset < end, "a step after the last"
        return first * batch, min(steps * batch, end - first * batch)

    def _at(self, position: int) -> Row:
        epoch, offset = divmod(position, self.rows_per_epoch)
        start, length = self._window(epoch, offset)
        batch = self._global_batch
        origin = epoch * self.rows_per_epoch % batch  # the place of the batch that the epoch, and so every window, begins at
        step, place = (offset - start) // batch, (origin + offset) % batch
        whole, more = divmod(length, batch)
        # Every place has a row in `whole` steps of the window; `more` places, from `origin` on and around, have one more.
        before = max(0, min(place, origin + more) - origin) + min(place, max(0, origin + more - batch))
        return self._in_stream(epoch, start + place * whole + before + step)

    def _in_stream(self, epoch: int, index: int) -> Row:
        stream = self._epoch(epoch)
        run = int(np.searchsorted(stream.starts, index, side="right")) - 1
        shard, first = int(stream.shards[run]), int(stream.first_rows[run])
        slot, place = divmod(index - int(stream.starts[run]), self._group)
        # A run that does not begin its shard is the short group at its end.
        group = first // self._group if first or self._rows[shard] < self._group else int(self._groups_of(epoch, shard)[slot])
        return Row(shard, group * self._group + int(self._rows_of(epoch, shard, group)[place]))

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = shuffled(len(self._rows), self._seed, epoch)
        rows = self._rows[shards]
        short = rows % self._group
        lengths = np.concatenate([rows - short, short])
        there = lengths > 0
        starts = np.cumsum(lengths[there]) - lengths[there]
        first_rows = np.concatenate([np.zeros_like(rows), rows - short])
        return _Epoch(np.concatenate([shards, shards])[there], first_rows[there], starts)

    def _permuted_groups(self, epoch: int, shard: int) -> Indices:
        return shuffled(int(self._rows[shard]) // self._group, self._seed, epoch, shard)

    def _permuted_rows(self, epoch: int, shard: int, group: int) -> Indices:
        rows = min(self._group, int(self._rows[shard]) - group * self._group)
        return shuffled(rows, self._seed, epoch, shard, group)

    @cached_property
    def _first_use(self) -> tuple[Indices, Indices]:
        """Shards in the order in which the first epoch's stream comes to them, and where it does."""
        stream = self._epoch(0)
        _, runs = np.unique(stream.shards, return_index=True)
        runs.sort()
        return stream.shards[runs], stream.starts[runs]
