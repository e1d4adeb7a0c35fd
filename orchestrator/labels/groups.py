"""Row groups with their labels: fetched, verified and unpacked, without torch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from orchestrator.errors import IntegrityError
from orchestrator.labels.layout import Arrays, Shape
from orchestrator.labels.packing import Unpacking
from orchestrator.spec.labels import Labels
from orchestrator.store.files import Store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.row_groups import ShardFile
from orchestrator.store.shard_pages import ShardPages
from orchestrator.store.shards import TokenShard, made_anew, token_file

FILES_KEPT = 64
"""Shards whose footers stay in memory."""


@dataclass(frozen=True)
class Group:
    """Rows of one row group."""

    tokens: TokenShard
    labels: Arrays = field(default_factory=Arrays)


@dataclass(frozen=True)
class GroupSource:
    """The source of row groups; small, whatever the size of the corpus."""

    store: Store
    shards: ShardPages
    log_key: str | None
    """Key of the log of the labels to read; None to read tokens alone."""
    labels: Labels | None
    shape: Shape


class GroupReader:
    """Reads row groups of `source`, whose shards are committed."""

    def __init__(self, source: GroupSource) -> None:
        self._source = source
        self._log = LabelLog(source.store, source.log_key) if source.log_key else None
        self._unpacking = Unpacking(source.labels, source.shape) if source.labels else None
        self._files: OrderedDict[int, tuple[ShardFile, ShardFile | None]] = OrderedDict()

    def read(self, shard: int, group: int) -> Group:
        """Raises `IntegrityError` for what is damaged, gone, or made from other tokens."""
        tokens_file, labels_file = self._files_of(shard)
        with made_anew(self._source.store, self._source.shards.folder):
            tokens = TokenShard.from_table(tokens_file.group(group))
        if labels_file is None:
            return Group(tokens)
        assert self._log and self._unpacking
        columns = self._log.read_group(shard, labels_file, group, tokens)
        try:
            return Group(tokens, self._unpacking.unpack(columns))
        except ValueError as error:
            raise IntegrityError(f"label shard {shard}: {error}") from error

    def _files_of(self, shard: int) -> tuple[ShardFile, ShardFile | None]:
        if shard not in self._files:
            source, labels = self._source, None
            tokens = token_file(source.store, source.shards.folder, source.shards.record(source.store, shard))
            if self._log is not None:
                record = self._log.committed(shard)
                assert record is not None, "asked for before its labels were awaited"
                labels = self._log.file(shard, record)
            self._files[shard] = (tokens, labels)
            if len(self._files) > FILES_KEPT:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]
