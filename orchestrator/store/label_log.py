"""The label log: what a teacher said, kept shard by shard, never lost, never doubled, never stale.

    labels/<key>/key.json               everything the key was made of
                 data/<shard>-<hash>.parquet
                 commits/<shard>.json   put-if-absent: the one commit point of a shard, the first writer wins
                 seals/<demand>.json    totals over a demanded set of shards, once all are committed

Writers never wait for each other and followers never list: a shard is there when its commit record is. Row i of label
shard s belongs to row i of token shard s; `ids_sha256` proves it on every read.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The pyarrow stubs leave types open.

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.errors import DataError, IntegrityError, ResumableError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.store.files import Store
from orchestrator.store.records import Record, ShardRecord, TokenManifest
from orchestrator.store.shards import ROW_ID_BYTES, TokenShard, binary_column, get_row_ids, get_shard, put_shard

LABEL_SCHEMA_VERSION = 2
_IDENTITY = ("row_id", "ids_sha256")

POLL_S = (0.02, 1.0)
"""The shortest and the longest pause between two looks for a commit record."""
PATIENCE = 0.25
"""Pauses are this share of the time waited so far, so that a wait lasts at most that much too long."""
CHECK_ABORT_S = 1.0
READERS = 8
"""Threads that count rows: storage that is far away answers slowly, but many at once."""
SHARDS_A_READER = 256
"""Shards whose row ids one of them reads in one go."""


class Seal(Record):
    """Totals of a complete demand on the log."""

    key: str
    shards: int
    rows: int
    bytes: int
    content: str
    """Hex identity over the hashes of all shards."""


class Ledger(Record):
    """What was asked for against what is there; every figure counts rows."""

    planned: int
    committed: int
    quarantined: int
    duplicates: int

    @property
    def balanced(self) -> bool:
        return self.planned == self.committed + self.quarantined and self.duplicates == 0


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
        """What the key was made of; raises `IntegrityError` for a folder that is no log or of another schema."""
        try:
            document: Any = self.store.read_json(f"{self.folder}/key.json")
        except ValueError as error:
            raise IntegrityError(f"{self.store.address(self.folder)}/key.json is damaged: {error}") from error
        if not isinstance(document, dict) or document.get("schema_version") != LABEL_SCHEMA_VERSION:
            raise IntegrityError(f"{self.store.address(self.folder)}: not a label log of schema version {LABEL_SCHEMA_VERSION}")
        return document

    def commit(self, shard: int, tokens: TokenShard, labels: dict[str, list[bytes]]) -> ShardRecord:
        """Commit the labels of token shard `shard`: one bytes value per row and column.

        Returns the record that stands afterwards, this writer's or that of an earlier one.
        Raises `DataError` if a column does not have one value per row.
        """
        for column, values in labels.items():
            if len(values) != len(tokens.row_ids):
                raise DataError(f"labels of shard {shard}: {len(values)} rows of {column} for {len(tokens.row_ids)} rows")
        identity = pa.binary(ROW_ID_BYTES)
        columns: dict[str, pa.Array[Any]] = {
            "row_id": pa.array(tokens.row_ids, identity),
            "ids_sha256": pa.array(tokens.ids_sha256(), identity),
            **{name: pa.array(values, pa.binary()) for name, values in labels.items()},
        }
        table = pa.table(columns).replace_schema_metadata({"schema_version": str(LABEL_SCHEMA_VERSION)})
        record = put_shard(self.store, f"{self.folder}/data", shard, table)
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
        record = ShardRecord(file=file, sha256=digest, rows=0, bytes=len(data))
        self.store.put_if_absent(f"{self.folder}/{name}.json", record.model_dump_json().encode())

    def kept(self, name: str) -> bytes | None:
        """What was kept under `name`, None if nothing was; raises `IntegrityError` if it has changed since."""
        record = ShardRecord.load(self.store, f"{self.folder}/{name}.json")
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

    def read(self, shard: int, record: ShardRecord, tokens: TokenShard) -> dict[str, list[bytes]]:
        """The label columns of a committed shard; raises `IntegrityError` if they are damaged or of other tokens."""
        where = f"label shard {shard}"
        with self._repairable():
            table = get_shard(self.store, f"{self.folder}/data", record, where)
        if binary_column(table, "ids_sha256") != tokens.ids_sha256() or binary_column(table, "row_id") != tokens.row_ids:
            raise IntegrityError(f"{where}: made from other tokens than token shard {shard} holds")
        return {name: binary_column(table, name) for name in table.column_names if name not in _IDENTITY}

    def shards(self) -> list[int]:
        """Numbers of all shards that have a commit record, ascending."""
        return [int(name.removesuffix(".json")) for name in self.store.keys(f"{self.folder}/commits")]

    def all_committed(self) -> list[tuple[int, ShardRecord]]:
        """Every committed shard with its record; raises `IntegrityError` for a folder that is no log."""
        self.identity()
        return [(shard, record) for shard in self.shards() if (record := self.committed(shard)) is not None]

    def check(self, shard: int, record: ShardRecord) -> None:
        """Read a committed shard in full; raises `IntegrityError` if a byte of it is not as it was written."""
        get_shard(self.store, f"{self.folder}/data", record, f"label shard {shard}")

    def seal(self, shards: Sequence[int], manifest: TokenManifest) -> tuple[Seal, Ledger]:
        """Close the books over `shards`: every row of every one is there exactly once.

        Raises `IntegrityError` if the ledger does not balance.
        """
        ledger, records = self.ledger(shards, manifest)
        if not ledger.balanced:
            raise IntegrityError(
                f"label ledger does not balance: planned {ledger.planned}, committed {ledger.committed}, "
                f"quarantined {ledger.quarantined}, duplicates {ledger.duplicates}"
            )
        seal = Seal(
            key=self.key,
            shards=len(records),
            rows=sum(r.rows for r in records),
            bytes=sum(r.bytes for r in records),
            content=fingerprint("seal", [r.sha256 for r in records]),
        )
        demand = fingerprint("demand", sorted(shards))
        self.store.put_if_absent(f"{self.folder}/seals/{demand}.json", seal.model_dump_json(indent=1).encode())
        return seal, ledger

    def ledger(self, shards: Sequence[int], manifest: TokenManifest) -> tuple[Ledger, list[ShardRecord]]:
        """Count the rows of `shards` from the row ids on storage, not from what anybody said was written."""
        parts = [shards[i : i + SHARDS_A_READER] for i in range(0, len(shards), SHARDS_A_READER)]
        with ThreadPoolExecutor(READERS) as readers:
            found = [shard for part in readers.map(self._row_ids, parts) for shard in part]
        identity: Any = pa.binary(ROW_ID_BYTES)  # which the stubs do not know in chunks
        row_ids = pa.chunked_array([ids for _, ids in found], identity)
        distinct: int = pc.count_distinct(row_ids).as_py()
        planned = sum(manifest.train[s].rows for s in shards)
        ledger = Ledger(planned=planned, committed=distinct, quarantined=0, duplicates=len(row_ids) - distinct)
        return ledger, [record for record, _ in found]

    def _row_ids(self, shards: Sequence[int]) -> list[tuple[ShardRecord, pa.Array[Any]]]:
        """The committed ones of `shards`, each with the row ids that its file holds."""
        folder = f"{self.folder}/data"
        with self._repairable():
            records = [(shard, record) for shard in shards if (record := self.committed(shard)) is not None]
            return [(record, get_row_ids(self.store, folder, record, f"label shard {s}")) for s, record in records]

    @contextmanager
    def _repairable(self) -> Generator[None]:
        """Have a damaged or missing shard say how it is made again."""
        try:
            yield
        except IntegrityError as error:
            way_out = f"distill labels repair {self.store.address(self.folder)}, then run the job again"
            raise IntegrityError(f"{error}; {way_out}") from error

    def commit_key(self, shard: int) -> str:
        """Where the commit record of `shard` lies."""
        return f"{self.folder}/commits/{shard:06d}.json"


def _pretty(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()
