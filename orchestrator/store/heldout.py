"""Held-out rows to measure on: which they are, and where labels of a few of them are kept.

Rows that a training is watched on are the last ones of their shards, rows that models are measured on at the end the first.
A training that is stopped, or whose model is chosen, by some rows is so measured on others, where there are enough. Which rows
these are follows from how many each shard has, so every process finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.spec.labels import HiddenLabels, TopkLabels
from orchestrator.store.files import Store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import TokenManifest
from orchestrator.store.shards import TokenShard, joined, read_rows


@dataclass(frozen=True)
class HeldoutLog:
    """The teacher's answers on `rows` held-out rows, those of `watched_rows`: shard 0 of the label log `key`."""

    key: str
    labels: TopkLabels
    rows: int


ANSWERS = "heldout"
"""Folder of the storage that holds the logs of answers on measured rows."""
ANSWER_TOKENS = 1 << 15
"""Tokens of one shard of such a log: of the widest teachers a shard of hidden states has about 1 GB."""
SPEED, CONTINUATIONS, DRAFTS = "speed", "continuations", "drafts"
"""Names under which such a log keeps, beside its shards, how fast the teacher answers, how it continues prompts, and how far
its multi-token-prediction modules hold."""


@dataclass(frozen=True)
class AnswerLog:
    """The label log of what the teacher says on the held-out rows that models are measured on, those of `measured_rows`.

    A shard of it is about so many of these rows, in their order, that they have about `ANSWER_TOKENS` tokens.
    """

    key: str
    labels: HiddenLabels | TopkLabels
    rows: int
    watched: int
    """Rows that training is evaluated on."""

    def open(self, store: Store) -> LabelLog:
        """The log itself."""
        return LabelLog(store, self.key, ANSWERS)

    def shards(self, manifest: TokenManifest) -> list[range]:
        """The rows of each shard of the log."""
        there = sum(map(len, choose_measured(manifest.heldout_rows, self.rows, self.watched).values()))
        each = max(1, ANSWER_TOKENS // manifest.seq_len)
        return [range(start, min(start + each, there)) for start in range(0, there, each)]


Choice = dict[int, range]
"""Chosen rows by shard."""


def choose_watched(shards: Sequence[int], rows: int) -> Choice:
    """At most `rows` rows, the last ones of shards with so many rows each."""
    return {shard: range(shards[shard] - count, shards[shard]) for shard, count in _evenly(shards, rows).items()}


def choose_measured(shards: Sequence[int], rows: int, watched: int) -> Choice:
    """At most `rows` rows, the first ones of shards with so many rows each; none of the `watched` ones if `disjoint`."""
    there = _unwatched(shards, watched) if disjoint(shards, rows, watched) else shards
    return {shard: range(count) for shard, count in _evenly(there, rows).items()}


def disjoint(shards: Sequence[int], rows: int, watched: int) -> bool:
    """Return whether enough rows are left to measure on without the watched ones: all that are asked for, or as many as are
    watched."""
    return sum(_unwatched(shards, watched)) >= min(rows, watched)


def _unwatched(shards: Sequence[int], watched: int) -> list[int]:
    taken = choose_watched(shards, watched)
    return [rows - len(taken.get(shard, ())) for shard, rows in enumerate(shards)]


def _evenly(shards: Sequence[int], rows: int) -> dict[int, int]:
    """Return how many of `rows` to take from each shard, evenly from as many shards as that allows."""
    there = [shard for shard, count in enumerate(shards) if count]
    taken = min(rows, len(there))
    return {
        shard: min(-(-(rows - i) // taken), shards[shard])
        for i, shard in enumerate(there[i * len(there) // taken] for i in range(taken))
    }


def measured_rows(store: Store, folder: str, manifest: TokenManifest, rows: int, watched: int) -> TokenShard:
    """The rows of `choose_measured`, where `watched` are watched; `folder` is that of the tokens."""
    return _read(store, folder, manifest, choose_measured(manifest.heldout_rows, rows, watched))


def watched_rows(store: Store, folder: str, manifest: TokenManifest, rows: int) -> TokenShard:
    """The rows of `choose_watched`; `folder` is that of the tokens."""
    return _read(store, folder, manifest, choose_watched(manifest.heldout_rows, rows))


def _read(store: Store, folder: str, manifest: TokenManifest, choice: Choice) -> TokenShard:
    records = manifest.heldout.records(store, choice)
    parts = zip(records, choice.values(), strict=True)
    return joined([read_rows(store, f"{folder}/heldout", record, rows, manifest.group_rows) for record, rows in parts])
