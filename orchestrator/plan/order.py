"""The training order: which rows make up global batch s, a pure function of (shard sizes, seed, s).

Nothing about workers enters, so 1, 2 or 64 of them see the same batches, and a checkpoint needs to store only the
step. Shards are visited in an order drawn per epoch, and the rows inside a shard in an order drawn per epoch and
shard; the data stage has already spread the documents over the shards. Randomness is a counter hash
(splitmix64, Steele et al. 2014) and not a library's generator, whose stream may change with its version.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


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


class TrainingOrder:
    """Rows of every global batch, as (shard, row) pairs.

    `shard_rows[i]` is the number of rows in token shard i. A batch may straddle two epochs: no row is ever dropped.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, global_batch: int) -> None:
        self._rows = np.asarray(shard_rows, dtype=np.int64)
        self._seed = seed
        self._global_batch = global_batch
        self._epochs: dict[int, tuple[Indices, Indices]] = {}
        self._inner: dict[tuple[int, int], Indices] = {}
        self.rows_per_epoch = int(self._rows.sum())
        assert self._rows.min() > 0

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(shard, row) of each of the `global_batch` rows of `step`, in order."""
        first = step * self._global_batch
        return [self._at(position) for position in range(first, first + self._global_batch)]

    def share(self, step: int, rank: int, world: int) -> list[tuple[int, int]]:
        """The rows of `step` that data-parallel `rank` of `world` trains on: a contiguous slice, so few shards."""
        each = self._global_batch // world
        first = step * self._global_batch + rank * each
        return [self._at(position) for position in range(first, first + each)]

    def shards_until(self, steps: int) -> list[int]:
        """Every shard that the first `steps` steps touch, once, in the order of its first use."""
        shards, _ = self._epoch(0)
        return [int(s) for s in shards[: self.shard_count_until(steps)]]

    def shard_count_until(self, steps: int) -> int:
        """How many shards the first `steps` steps touch."""
        rows = min(steps * self._global_batch, self.rows_per_epoch)
        _, starts = self._epoch(0)
        return int(np.searchsorted(starts, rows, side="left"))

    def _at(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.rows_per_epoch)
        shards, starts = self._epoch(epoch)
        slot = int(np.searchsorted(starts, offset, side="right")) - 1
        shard = int(shards[slot])
        return shard, int(self._rows_of(epoch, shard)[offset - int(starts[slot])])

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Shards in the order of `epoch`, and the position within the epoch at which each begins."""
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.clear()
            shards = shuffled(len(self._rows), self._seed, epoch)
            starts = np.concatenate([[0], np.cumsum(self._rows[shards])[:-1]])
            self._epochs[epoch] = (shards, starts)
        return self._epochs[epoch]

    def _rows_of(self, epoch: int, shard: int) -> Indices:
        if (epoch, shard) not in self._inner:
            if len(self._inner) > 64:
                self._inner.clear()
            self._inner[epoch, shard] = shuffled(int(self._rows[shard]), self._seed, epoch, shard)
        return self._inner[epoch, shard]
