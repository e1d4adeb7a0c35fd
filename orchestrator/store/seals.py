"""The books over a label log: which shards were compared with their tokens, and the totals of complete demands.

A shard is compared once. Its row ids must be those of its token shard, in the same order, which the hashes in both records
tell; so no row is missing, doubled or of another shard. What was found stands on pages of shards, which every later demand
reuses. Commit records never change, and `store/label_repair.py` removes these books before it removes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from orchestrator.errors import IntegrityError
from orchestrator.plan.fingerprint import FINGERPRINT_HEX, fingerprint
from orchestrator.store.interface import Store
from orchestrator.store.record import Record
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import PAGE_SHARDS, ShardRecord
from orchestrator.store.shards import read_tokens

READERS = 8
"""Threads that look at shards: storage that is far away answers slowly, but many at once."""


class Seal(Record):
    """Totals of a complete demand on the log."""

    key: str
    shards: int
    rows: int
    bytes: int
    content: str
    """Hex identity over the hashes of all shards, in the order of their numbers."""


class Ledger(Record):
    """The rows that were planned against those that are there; every figure counts rows."""

    planned: int
    committed: int
    quarantined: int
    duplicates: int

    @property
    def balanced(self) -> bool:
        return self.planned == self.committed + self.quarantined and self.duplicates == 0


class Compared(Record):
    """A shard whose rows are those of its token shard."""

    sha256: str
    rows: int
    bytes: int


class Page(Record):
    """Shards that were compared, by number."""

    shards: dict[int, Compared]


@dataclass(frozen=True)
class Committed:
    """A committed shard whose file is there."""

    record: ShardRecord
    row_ids: Callable[[], list[bytes]]
    """Reads them from the file."""


Look = Callable[[int], Committed | None]
"""Finds a shard; None where it is not committed, `IntegrityError` where it is damaged."""


class Seals:
    """The books of the label log `key` in `folder`."""

    def __init__(self, store: Store, folder: str, key: str) -> None:
        self._store, self._folder, self._key = store, folder, key

    def close(self, shards: Sequence[int], manifest: TokenManifest, look: Look) -> tuple[Seal, Ledger]:
        """The seal of `shards`, made now or before; raises `IntegrityError` if the ledger does not balance."""
        name = f"{self._folder}/seals/{fingerprint('demand', sorted(shards))}.json"
        planned = int(manifest.train.rows[list(shards)].sum())
        standing = Seal.load(self._store, name)
        if standing is not None:
            return standing, Ledger(planned=planned, committed=standing.rows, quarantined=0, duplicates=0)
        count = rows = size = committed = duplicates = 0
        content = hashlib.sha256()
        with ThreadPoolExecutor(READERS) as readers:
            for part in self._pages(sorted(shards), manifest, look, readers):
                for one in part.compared.values():
                    count, rows, size = count + 1, rows + one.rows, size + one.bytes
                    content.update(bytes.fromhex(one.sha256))
                committed, duplicates = committed + part.committed, duplicates + part.duplicates
        ledger = Ledger(planned=planned, committed=rows + committed, quarantined=0, duplicates=duplicates)
        if not ledger.balanced:
            raise IntegrityError(
                f"label ledger does not balance: planned {ledger.planned}, committed {ledger.committed}, "
                f"quarantined {ledger.quarantined}, duplicates {ledger.duplicates}"
            )
        seal = Seal(key=self._key, shards=count, rows=rows, bytes=size, content=content.hexdigest()[:FINGERPRINT_HEX])
        self._store.put_if_absent(name, seal.model_dump_json(indent=1).encode())
        return seal, ledger

    def _pages(
        self, shards: Sequence[int], manifest: TokenManifest, look: Look, readers: ThreadPoolExecutor
    ) -> Iterator[_Part]:
        """Yield what is there of the ascending `shards`, page by page; compare and record what was not compared before."""
        for number, members in groupby(shards, lambda shard: shard // PAGE_SHARDS):
            name, wanted = f"{self._folder}/sealed/{number:06d}.json", list(members)
            page = Page.load(self._store, name) or Page(shards={})
            new = [shard for shard in wanted if shard not in page.shards]
            part = _Part({shard: page.shards[shard] for shard in wanted if shard in page.shards})
            for shard, due, there in zip(new, manifest.train.records(self._store, new), readers.map(look, new), strict=True):
                if there is not None:
                    part.add(shard, due, there, lambda record=due: _row_ids_of(self._store, manifest, record))
            if new and part.compared:
                everything = Page(shards=page.shards | part.compared)
                self._store.replace(name, everything.model_dump_json().encode())
            yield _Part(dict(sorted(part.compared.items())), part.committed, part.duplicates)


@dataclass
class _Part:
    compared: dict[int, Compared]
    committed: int = 0
    """Rows of shards that hold other rows than they should: those that are theirs."""
    duplicates: int = 0
    """The others."""

    def add(self, shard: int, due: ShardRecord, there: Committed, row_ids: Callable[[], list[bytes]]) -> None:
        record = there.record
        if record.rows_sha256 == due.rows_sha256:
            self.compared[shard] = Compared(sha256=record.sha256, rows=record.rows, bytes=record.bytes)
            return
        given = there.row_ids()
        own = len(set(given) & set(row_ids()))
        self.committed += own
        self.duplicates += len(given) - own


def _row_ids_of(store: Store, manifest: TokenManifest, record: ShardRecord) -> list[bytes]:
    return read_tokens(store, manifest.train.folder, record).row_ids
