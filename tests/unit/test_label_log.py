"""The label log: the first commit wins, followers wait for it, and other labels never have the same key."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.errors import DataError, IntegrityError, ResumableError
from orchestrator.store import label_log
from orchestrator.store.label_log import LabelLog
from orchestrator.store.shard_pages import ShardRecord
from tests.label_logs import IDENTITY, labels_of, temporary_files, tokens_of, verified

# Commits.


def test_a_shard_is_there_once_it_is_committed(log: LabelLog) -> None:
    tokens = tokens_of(0)
    assert log.committed(0) is None
    record = log.commit(0, tokens, labels_of(tokens))
    assert log.committed(0) == record
    assert record.rows == 4
    assert log.read(0, record, tokens) == labels_of(tokens)
    assert verified(log) == [(0, record)]
    assert not temporary_files(log.store)


def test_the_first_commit_wins(log: LabelLog) -> None:
    tokens = tokens_of(3)
    first = log.commit(3, tokens, labels_of(tokens, salt=1))
    second = log.commit(3, tokens, labels_of(tokens, salt=2))
    assert second == first
    assert log.read(3, second, tokens) == labels_of(tokens, salt=1) != labels_of(tokens, salt=2)
    assert len(log.store.keys(f"{log.folder}/data")) == 2, "the loser's file stays, and nobody names it"
    assert log.commit(3, tokens, labels_of(tokens, salt=1)) == first, "a repeated commit is no error"


def test_of_many_writers_at_once_one_wins(log: LabelLog) -> None:
    tokens, results = tokens_of(0), {}
    barrier = threading.Barrier(8)

    def write(salt: int) -> None:
        labels = labels_of(tokens, salt)
        barrier.wait()
        results[salt] = log.commit(0, tokens, labels)

    threads = [threading.Thread(target=write, args=(salt,)) for salt in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert set(results.values()) == {log.committed(0)}
    assert log.read(0, results[0], tokens) in [labels_of(tokens, salt) for salt in range(8)]


def test_missing_keeps_the_order_asked_for(log: LabelLog) -> None:
    assert log.missing([5, 2, 9]) == [5, 2, 9]
    log.commit(2, tokens_of(2), labels_of(tokens_of(2)))
    log.commit(7, tokens_of(7), labels_of(tokens_of(7)))
    assert log.missing([9, 2, 5, 7]) == [9, 5]
    assert log.missing([2]) == []


@pytest.mark.parametrize("rows", [3, 5])
def test_a_column_of_other_length_is_refused(log: LabelLog, rows: int) -> None:
    tokens, (labels,) = tokens_of(1), labels_of(tokens_of(1, rows=5))
    with pytest.raises(DataError, match=rf"shard 1: {rows} rows of counts@1 for 4 rows") as caught:
        log.commit(1, tokens, [labels_of(tokens)[0] | {"counts@1": labels["counts@1"][:rows]}])
    assert caught.value.exit_code == 3
    assert log.committed(1) is None


# Followers.


class Watched(LabelLog):
    """A log that counts how often a follower looks."""

    looks = 0

    def committed(self, shard: int) -> ShardRecord | None:
        self.looks += 1
        return super().committed(shard)


def test_a_follower_looks_ever_less_often(log: LabelLog) -> None:
    watched, wait_s = Watched(log.store, log.key), 1.0
    tokens, began = tokens_of(0), time.monotonic()
    writer = threading.Timer(wait_s, lambda: log.commit(0, tokens, labels_of(tokens)))
    writer.start()
    record = watched.awaited(0, lambda: None)
    waited_s = time.monotonic() - began
    writer.join()
    assert waited_s >= wait_s and record == log.committed(0)
    assert 3 < watched.looks < wait_s / label_log.POLL_S[0] / 2, "less than half of what the shortest pause would make"
    assert watched.awaited(0, lambda: None) == record


def test_a_follower_gives_up_when_told_to(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_log, "CHECK_ABORT_S", 0.05)
    reasons = iter([None, None, "the teacher died"])
    with pytest.raises(ResumableError, match="training stopped waiting for label shard 4: the teacher died") as caught:
        log.awaited(4, lambda: next(reasons))
    assert caught.value.exit_code == 6
    assert next(reasons, "all asked") == "all asked"


# Identity.


def changed(identity: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`identity` with one leaf after another made different."""
    for section, name in [
        ("teacher", "content"),
        ("teacher", "dtype"),
        (None, "tokens"),
        *(("labels", k) for k in IDENTITY["labels"]),
    ]:
        other = copy.deepcopy(identity)
        place = other if section is None else other[section]
        value = place[name]
        place[name] = [*value, 3.0] if isinstance(value, list) else value + 1 if isinstance(value, int) else value + "x"
        yield f"{section}.{name}", other


def test_every_field_of_the_identity_changes_the_key(log: LabelLog) -> None:
    keys = {name: LabelLog.open(log.store, other).key for name, other in changed(IDENTITY)}
    assert len({log.key, *keys.values()}) == 1 + 7
    reordered = {name: IDENTITY[name] for name in reversed(IDENTITY)}
    assert LabelLog.open(log.store, reordered).key == log.key, "the order of the fields is not part of the identity"


def test_a_new_identity_never_meets_old_labels(log: LabelLog) -> None:
    log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
    for _, other in changed(IDENTITY):
        assert LabelLog.open(log.store, other).missing([0]) == [0]
    assert LabelLog.open(log.store, IDENTITY).missing([0]) == []


def test_a_schema_version_is_not_read_by_another(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
    assert log.identity() == {"schema_version": 3, **IDENTITY}
    monkeypatch.setattr(label_log, "LABEL_SCHEMA_VERSION", 4)
    assert LabelLog.open(log.store, IDENTITY).key != log.key
    with pytest.raises(IntegrityError, match="not a label log of schema version 4"):
        verified(log)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema_version": "1"}', None])
def test_a_folder_without_an_intact_key_is_no_log(log: LabelLog, content: bytes | None) -> None:
    file = log.store.path(f"{log.folder}/key.json")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(IntegrityError, match=re.escape(str(log.store.path(log.folder)))):
        verified(log)
