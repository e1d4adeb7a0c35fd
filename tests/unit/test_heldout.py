"""Which held-out windows a model is measured on."""

from __future__ import annotations

import pytest
import torch

from orchestrator.evaluate.measure import Heldout
from orchestrator.store.shards import read_tokens
from tests.conftest import TokenizedCorpus


@pytest.mark.parametrize("rows", [1, 3, 20, 10_000])
def test_windows_come_evenly_from_all_shards(tokenized: TokenizedCorpus, rows: int) -> None:
    store, folder, manifest = tokenized.store, tokenized.folder, tokenized.manifest
    shards = [read_tokens(store, f"{folder}/heldout", record).ids.tolist() for record in manifest.heldout]
    assert len(shards) > 2
    windows, kept = Heldout(store, folder, manifest, rows).windows()
    assert windows.dtype == torch.int64
    assert kept.shape == windows[:, 1:].shape and kept.all(), "nothing in this corpus is a prompt"
    found = [sum(window in shard for window in windows.tolist()) for shard in shards]
    assert sum(found) == len(windows) <= rows
    share = -(-rows // len(shards))
    assert all(share - 1 <= n <= share or n == len(shard) for n, shard in zip(found, shards, strict=True))
