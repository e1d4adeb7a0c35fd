"""The label log: what a teacher said, kept shard by shard, never lost, never doubled, never stale.

    labels/<key>/key.json               everything the key was made of
                 data/<shard>-<hash>.parquet
                 commits/<shard>.json   put-if-absent: the one commit point of a shard, the first writer wins
                 sealed/<page>.json     shards that were compared with their tokens, see `store/seals.py`
                 seals/<demand>.json    totals over a demanded set of shards, once all are committed

Writers never wait for each other and followers never list: a shard is there when its commit record is. Row i of label
shard s belongs to row i of token shard s, and so do their row groups; `ids_sha256` proves it on every read.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pyarrow as pa

from orchestrator.errors import DataError, IntegrityError, ResumableError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.files import Store
from orchestrator.store.record import Record
from orchestrator.store.records import TokenManifest
from orchestrator.store.row_groups import ShardFile, binary_column, put_shard
from orchestrator.store.seals import Committed, Ledger, Seal, Seals
from orchestrator.store.shard_pages import ShardRecord
from orchestrator.store.shards import ROW_ID_BYTES, TokenShard

LABEL_SCHEMA_VERSION = 3
_IDENTITY = ("row_id", "ids_sha256")

POLL_S = (0.02, 1.0)
"""The shortest and the longest pause between two looks for a commit record."""
PATIENCE = 0.25
"""Pauses are this share of the time waited so far, so that a wait lasts at most that much too long."""
CHECK_ABORT_S = 1.0


class Kept(Record):
    """A file that is kept beside the shards."""

    file: str
    sha256: str


class LabelLog:
    """One teacher's labels of one token manifest, under one labelling."""

    def __init__(self, store: Store, key: str, root: str = "labels") -> None:
        self.store = store
        self.key = key
        self.folder = f"{root}/{key}"

    @classmethod
    def open(cls, store: Store, identity: dict[str, Any], root: str = "labels") -> LabelLog:
        """The log in the folder `root` whose key is the hash of `identity`, created if it is new."""
        log = cls(store, fingerprint("labels", LABEL_SCHEMA_VERSION, identity), root)
        if not store.exists(f"{log.folder}/key.json"):
            document = {"schema_version": LABEL_SCHEMA_VERSION, **identity}
            store.put_if_absent(f"{log.folder}/key.json", _pretty(document))
        return log

    def identity(self) -> dict[str, Any]:
        """Return what the key was made of; raises `IntegrityError` for a folder that is no log or of another schema."""
        try:
            document: Any = self.store.read_json(f"{self.folder}/key.json")
        except ValueError as error:
            raise IntegrityError(f"{self.store.address(self.folder)}/key.json is damaged: {error}") from error
        if not isinstance(document, dict) or document.get("schema_version") != LABEL_SCHEMA_VERSION:
            raise IntegrityError(f"{self.store.address(self.folder)}: not a label log of schema version {LABEL_SCHEMA_VERSION}")
        return document

    def commit(self, shard: int, tokens: TokenShard, groups: Sequence[Mapping[str, Sequence[bytes]]]) -> ShardRecord:
        """Commit the labels of token shard `shard`: for each of its row groups one bytes value per row and column.

        Returns the record that stands afterwards, this writer's or that of an earlier one.
        Raises `DataError` if a column does not have one value per row.
        """
        for column in groups[0]:
            given = sum(len(group[column]) for group in groups)
            if given != len(tokens.row_ids):
                raise DataError(f"labels of shard {shard}: {given} rows of {column} for {len(tokens.row_ids)} rows")
        identity, tables, start = tokens.ids_sha256(), list[pa.Table](), 0
        for group in groups:
            rows = slice(start, start + len(next(iter(group.values()))))
            tables.append(_table(tokens.row_ids[rows], identity[rows], group))
            start = rows.stop
        record = put_shard(self.store, f"{self.folder}/data", shard, tables)
        if self.store.put_if_absent(self.commit_key(shard), record.model_dump_json().encode()):
            return record
        standing = self.committed(shard)
        assert standing is not None
        return standing

    def keep(self, name: str, data: bytes) -> None:
        """Store `data` beside the shards under `name`; what stands there already stays."""
        digest = hashlib.sha256(data).hexdigest()
        file = f"{name}-{digest[:32]}"
        self.store.put_if_absent(f"{self.folder}/{file}", data)
        record = Kept(file=file, sha256=digest)
        self.store.put_if_absent(f"{self.folder}/{name}.json", record.model_dump_json().encode())

    def kept(self, name: str) -> bytes | None:
        """Return the bytes kept under `name`, None if there are none; raises `IntegrityError` if they have changed since."""
        record = Kept.load(self.store, f"{self.folder}/{name}.json")
        if record is None:
            return None
        try:
            data = self.store.read(f"{self.folder}/{record.file}")
        except FileNotFoundError as error:
            raise IntegrityError(f"{self.store.address(self.folder)}: the file {record.file} is gone") from error
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise IntegrityError(
                f"{self.store.address(self.folder)}/{record.file}: sha256 mismatch, it has changed since it was written"
            )
        return data

    def kept_names(self) -> list[str]:
        """Names of everything that was kept."""
        files = [name.removesuffix(".json") for name in self.store.keys(self.folder) if name.endswith(".json")]
        return [name for name in files if name != "key"]

    def committed(self, shard: int) -> ShardRecord | None:
        """The commit record of `shard`, None while nobody has labelled it."""
        return ShardRecord.load(self.store, self.commit_key(shard))

    def awaited(self, shard: int, aborted: Callable[[], str | None]) -> ShardRecord:
        """The commit record of `shard`, as soon as it is there; raises `ResumableError` once `aborted` gives a reason."""
        began = checked = time.monotonic()
        while (record := self.committed(shard)) is None:
            now = time.monotonic()
            if now - checked > CHECK_ABORT_S:
                checked = now
                reason = aborted()
                if reason:
                    raise ResumableError(f"training stopped waiting for label shard {shard}: {reason}")
            shortest, longest = POLL_S
            time.sleep(min(longest, max(shortest, PATIENCE * (now - began))))
        return record

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Those of `shards` that are not committed, in the given order."""
        present = set(self.shards())
        return [s for s in shards if s not in present]

    def read(self, shard: int, record: ShardRecord, tokens: TokenShard) -> list[dict[str, list[bytes]]]:
        """The label columns of each row group of a committed shard.

        Raises `IntegrityError` if they are damaged or of other tokens.
        """
        with self._repairable():
            tables = self.file(shard, record).groups()
        starts = accumulate((table.num_rows for table in tables), initial=0)
        parts = [tokens.rows(slice(start, start + table.num_rows)) for start, table in zip(starts, tables, strict=False)]
        if sum(table.num_rows for table in tables) != len(tokens.row_ids):
            raise self._of_others(shard)
        return [self._labels(shard, table, part) for table, part in zip(tables, parts, strict=True)]

    def read_group(self, shard: int, file: ShardFile, group: int, tokens: TokenShard) -> dict[str, list[bytes]]:
        """The label columns of one row group of the committed `shard`, of which `tokens` are the same row group.

        `file` is that of the shard, which may be asked for many groups. Raises `IntegrityError` as `read` does.
        """
        with self._repairable():
            table = file.group(group)
        return self._labels(shard, table, tokens)

    def file(self, shard: int, record: ShardRecord) -> ShardFile:
        """The file of a committed shard, to read row groups of."""
        return ShardFile(self.store, f"{self.folder}/data", record, f"label shard {shard}")

    def _labels(self, shard: int, table: pa.Table, tokens: TokenShard) -> dict[str, list[bytes]]:
        if binary_column(table, "ids_sha256") != tokens.ids_sha256() or binary_column(table, "row_id") != tokens.row_ids:
            raise self._of_others(shard)
        return {name: binary_column(table, name) for name in table.column_names if name not in _IDENTITY}

    def _of_others(self, shard: int) -> IntegrityError:
        return IntegrityError(f"label shard {shard}: made from other tokens than token shard {shard} holds")

    def shards(self) -> list[int]:
        """Numbers of all shards that have a commit record, ascending."""
        return sorted(int(name.removesuffix(".json")) for name in self.store.keys(f"{self.folder}/commits"))

    def all_committed(self) -> list[tuple[int, ShardRecord]]:
        """Every committed shard with its record; raises `IntegrityError` for a folder that is no log."""
        self.identity()
        return [(shard, record) for shard in self.shards() if (record := self.committed(shard)) is not None]

    def check(self, shard: int, record: ShardRecord) -> None:
        """Read a committed shard in full; raises `IntegrityError` if a byte of it is not as it was written."""
        self.file(shard, record).check()

    def seal(self, shards: Sequence[int], manifest: TokenManifest) -> tuple[Seal, Ledger]:
        """Close the books over `shards` of `manifest`: every row of every one is there exactly once.

        A demand that was sealed before is known by its seal, and a shard that was compared with its tokens for another demand
        is not compared again. Raises `IntegrityError` if the ledger does not balance.
        """
        return Seals(self.store, self.folder, self.key).close(shards, manifest, self._looked_at)

    def _looked_at(self, shard: int) -> Committed | None:
        with self._repairable():
            record = self.committed(shard)
            if record is None:
                return None
            file = self.file(shard, record)
            file.look()
        return Committed(record, lambda: [row for table in file.groups() for row in binary_column(table, "row_id")])

    @contextmanager
    def _repairable(self) -> Generator[None]:
        """Have a damaged or missing shard say how it is made again."""
        try:
            yield
        except IntegrityError as error:
            way_out = f"distill labels repair {self.store.address(self.folder)}, then run the job again"
            raise IntegrityError(f"{error}; {way_out}") from error

    def commit_key(self, shard: int) -> str:
        """Return the key of the commit record of `shard`."""
        return f"{self.folder}/commits/{shard:06d}.json"


def _table(row_ids: list[bytes], ids_sha256: list[bytes], columns: Mapping[str, Sequence[bytes]]) -> pa.Table:
    identity = pa.binary(ROW_ID_BYTES)
    arrays: dict[str, pa.Array[Any]] = {
        "row_id": pa.array(row_ids, identity),
        "ids_sha256": pa.array(ids_sha256, identity),
        **{name: pa.array(values, pa.binary()) for name, values in columns.items()},
    }
    return pa.table(arrays).replace_schema_metadata({"schema_version": str(LABEL_SCHEMA_VERSION)})


def _pretty(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()
