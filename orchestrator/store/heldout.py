"""Held-out rows to measure on: which they are, and where labels of a few of them are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.spec.labels import TopkLabels
from orchestrator.store.files import Store
from orchestrator.store.records import TokenManifest
from orchestrator.store.shards import TokenShard, read_tokens


@dataclass(frozen=True)
class HeldoutLog:
    """What the teacher says on `rows` held-out rows, those of `watched_rows`: shard 0 of the label log `key`."""

    key: str
    labels: TopkLabels
    rows: int


def measured_rows(store: Store, folder: str, manifest: TokenManifest, rows: int) -> TokenShard:
    """At most `rows` held-out rows, evenly from as many shards as that allows; `folder` is that of the tokens."""
    return _evenly(store, folder, manifest, rows, from_end=False)


def watched_rows(store: Store, folder: str, manifest: TokenManifest, rows: int) -> TokenShard:
    """The same from the other ends of the shards.

    A training that is stopped, or whose model is chosen, by these rows is measured on others, where there are enough.
    """
    return _evenly(store, folder, manifest, rows, from_end=True)


def _evenly(store: Store, folder: str, manifest: TokenManifest, rows: int, from_end: bool) -> TokenShard:
    shards = manifest.heldout
    count = min(rows, len(shards))
    each, over = divmod(rows, count)
    parts: list[TokenShard] = []
    for i in range(count):
        tokens = read_tokens(store, f"{folder}/heldout", shards[i * len(shards) // count])
        wanted = min(each + (i < over), len(tokens.row_ids))
        parts.append(tokens.rows(slice(len(tokens.row_ids) - wanted, None) if from_end else slice(wanted)))
    masks = [part.loss_mask for part in parts if part.loss_mask is not None]
    return TokenShard(
        [row for part in parts for row in part.row_ids],
        np.concatenate([part.ids for part in parts]),
        np.concatenate(masks) if masks else None,
    )
