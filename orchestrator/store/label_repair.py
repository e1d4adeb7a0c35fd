"""Detection of lost parts of a label log, and giving them up so that the next run labels them again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import IntegrityError
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import ShardRecord


@dataclass(frozen=True)
class Loss:
    """A committed shard, or something kept beside the shards, that cannot be read back as it was written."""

    shard: int | None
    """None for what all shards depend on, such as a basis."""
    missing: bool
    """The file is gone; otherwise it is there and damaged."""
    problem: str


def examine(log: LabelLog) -> tuple[dict[int, ShardRecord], list[Loss]]:
    """Read a log in full: its intact shards, and everything that is lost.

    Raises `IntegrityError` for a folder that is no log.
    """
    log.identity()
    intact: dict[int, ShardRecord] = {}
    losses: list[Loss] = []
    for name in log.kept_names():
        try:
            log.kept(name)
        except IntegrityError as error:
            losses.append(_loss(None, error))
    for shard in log.shards():
        found = look(log, shard)
        if isinstance(found, Loss):
            losses.append(found)
        else:
            intact[shard] = found
    return intact, losses


def look(log: LabelLog, shard: int) -> ShardRecord | Loss:
    """The record of the committed `shard` if every byte of it is there."""
    try:
        record = log.committed(shard)
        if record is None:
            raise IntegrityError(f"label shard {shard}: its commit record is gone") from FileNotFoundError()
        log.check(shard, record)
    except IntegrityError as error:
        return _loss(shard, error)
    return record


def give_up(log: LabelLog, losses: Sequence[Loss]) -> list[int]:
    """Remove the commit records of lost shards, what is left of their damaged files, and the seals; returns these shards.

    Each is looked at once more before it is touched, and a data file whose name tells its content truly always stays, so
    nothing intact is removed. Raises `IntegrityError` where something is lost that all shards depend on.
    """
    if any(loss.shard is None for loss in losses):
        where = log.store.address(log.folder)
        raise IntegrityError(f"{where}: a file that all shards depend on is lost; remove this folder and run the job again")
    lost = [loss.shard for loss in losses if loss.shard is not None and isinstance(look(log, loss.shard), Loss)]
    if not lost:
        return []
    for books in ("seals", "sealed"):  # made again when the labels are complete
        log.store.remove(f"{log.folder}/{books}")
    files = log.store.keys(f"{log.folder}/data")
    for shard in lost:
        for file in (file for file in files if file.startswith(f"{shard:06d}-")):
            key = f"{log.folder}/data/{file}"
            content = hashlib.sha256(log.store.read(key)).hexdigest()
            if file.removesuffix(".parquet") != f"{shard:06d}-{content[:32]}":
                log.store.remove(key)
        log.store.remove(log.commit_key(shard))
    return lost


def count(losses: Sequence[Loss]) -> str:
    """Describe how much is lost: `3 missing, 1 damaged`."""
    kinds = Counter("missing" if loss.missing else "damaged" for loss in losses)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in ("missing", "damaged") if kinds[kind])


def _loss(shard: int | None, error: IntegrityError) -> Loss:
    return Loss(shard, isinstance(error.__cause__, FileNotFoundError), str(error))
