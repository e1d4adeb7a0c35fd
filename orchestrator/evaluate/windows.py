"""The held-out windows that models are measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.store.files import Store
from orchestrator.store.heldout import AnswerLog, measured_rows
from orchestrator.store.records import TokenManifest
from orchestrator.store.shards import TokenShard


@dataclass(frozen=True)
class Heldout:
    """Windows that no training has seen, and the log of the teacher's answers on them."""

    store: Store
    data_folder: str
    manifest: TokenManifest
    log: AnswerLog

    @property
    def tokenizer(self) -> Path:
        """The folder of their tokenizer on this node."""
        return self.store.local(f"{self.data_folder}/tokenizer")

    def rows(self) -> TokenShard:
        """All of the windows, evenly from as many shards as `log.rows` allows."""
        return measured_rows(self.store, self.data_folder, self.manifest, self.log.rows, self.log.watched)

    def shards(self) -> Iterator[tuple[int, TokenShard]]:
        """The windows of each shard of the log, whether it holds anything yet or not."""
        rows = self.rows()
        for shard, part in enumerate(self.log.shards(self.manifest)):
            yield shard, rows.rows(slice(part.start, part.stop))

    def targets(self) -> npt.NDArray[np.int64]:
        """Return the number of counted targets of each window, [windows]."""
        return self.rows().counted().sum(1, dtype=np.int64)

    def kept(self, name: str) -> Any | None:
        """Return the value that the teacher's processes stored in the log under `name`; None if they stored none."""
        data = self.log.open(self.store).kept(name)
        return None if data is None else json.loads(data)
