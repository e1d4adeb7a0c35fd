"""The teacher's actor without a cluster: what it labels, finds and defers, and what it does at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import ResumableError
from orchestrator.runtime.board import STUDENT_SHARDS, Board
from orchestrator.store.claims import Claims
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ShardRecord
from orchestrator.teacher import labeller
from orchestrator.teacher.labeller import Labeller
from orchestrator.teacher.task import Item, LabelTask
from orchestrator.teacher.writer import Asked


class Remote:
    """A board in this process, called as an actor is."""

    def __init__(self) -> None:
        self.board = Board()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.board, name))


def committed(rows: int) -> ShardRecord:
    return ShardRecord(file="f", sha256="", bytes=9, rows=rows, footer_bytes=0, footer_sha256="", rows_sha256="")


class Writer:
    """A log of which shards are committed; the teacher and the commit take as long as they are told to."""

    def __init__(self) -> None:
        self.records: dict[int, ShardRecord] = {}
        self.asked: list[int] = []
        self.during_ask: Callable[[int], None] = lambda shard: None
        self.during_commit: Callable[[int], None] = lambda shard: None

    def committed(self, item: Item) -> ShardRecord | None:
        return self.records.get(item.shard)

    def ask(self, item: Item) -> Asked:
        self.asked.append(item.shard)
        self.during_ask(item.shard)
        return Asked(item, None, [], {})  # type: ignore[arg-type]

    def commit(self, asked: Asked) -> ShardRecord:
        self.during_commit(asked.item.shard)
        return self.records.setdefault(asked.item.shard, committed(rows=16))


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    made = Writer()
    monkeypatch.setattr(labeller, "ShardWriter", lambda task: made)
    monkeypatch.setattr(labeller, "leave_placement", lambda: None)
    monkeypatch.setattr(labeller, "SETTLE_EVERY_S", 0.0)
    context = SimpleNamespace(get_actor_id=lambda: "replica")
    monkeypatch.setattr(labeller, "ray", SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context))
    return made


def actor(store: LocalStore, ahead: int | None = None) -> Labeller:
    labels: Any = SimpleNamespace(run_ahead=ahead)
    claims = Claims(store, "labels/k", "mine")
    task: Any = LabelTask(store, "data", None, 9, labels, "k", 8, Remote(), claims)  # type: ignore[arg-type]
    return Labeller(task)


def call(actor: Labeller, shard: int) -> list[tuple[int, str]]:
    """(rows, outcome) of each receipt of one call."""
    receipts = actor({"kind": ["shard"], "shard": [shard], "position": [shard]})
    return list(zip(receipts["rows"], receipts["outcome"], strict=True))


def board(actor: Labeller) -> Board:
    return actor._task.board.board


def test_what_is_committed_is_not_labelled_again(store: LocalStore, writer: Writer) -> None:
    one = actor(store)
    assert call(one, 3) == [(16, "labelled")] == [(r[0], "labelled") for r in call(one, 4)]
    assert call(one, 3) == [(16, "found")] and writer.asked == [3, 4]
    assert store.keys("labels/k/claims") == []


def test_what_another_run_has_claimed_is_deferred_until_it_is_committed_or_free(store: LocalStore, writer: Writer) -> None:
    one, other = actor(store), Claims(store, "labels/k", "other")
    store.replace(other.heartbeat("other"), b"")
    assert other.take("000003", "x") and other.take("000004", "x")
    assert call(one, 3) == call(one, 4) == [(0, "deferred")] and len(board(one).deferred()) == 2
    assert call(one, 5) == [(16, "labelled")] and writer.asked == [5], "the others go on"
    writer.records[3] = committed(rows=7)
    other.release("000003")
    assert call(one, 6) == [(7, "found"), (16, "labelled")] and len(board(one).deferred()) == 1
    store.remove(other.heartbeat("other"))
    assert call(one, 7) == [(16, "labelled"), (16, "labelled")] and writer.asked == [5, 6, 4, 7]
    assert board(one).deferred() == [] == store.keys("labels/k/claims")


def test_a_shard_that_was_committed_between_two_looks_is_found(store: LocalStore, writer: Writer) -> None:
    one, take = actor(store), Claims.take

    def late(claims: Claims, name: str, by: str) -> bool:
        writer.records[int(name)] = committed(rows=7)
        return take(claims, name, by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "take", late)
        assert call(one, 3) == [(7, "found")]
    assert writer.asked == [] == store.keys("labels/k/claims")


def test_deferred_shards_are_settled_while_the_student_is_waited_for(store: LocalStore, writer: Writer) -> None:
    """The student waits for shard 0, which another run has claimed and does not commit; the teacher waits for the student."""
    one, other = actor(store, ahead=1), Claims(store, "labels/k", "other")
    store.replace(other.heartbeat("other"), b"")
    assert other.take("000000", "x") and call(one, 0) == [(0, "deferred")]

    def student() -> None:
        time.sleep(0.3)
        store.remove(other.heartbeat("other"))
        while 0 not in writer.records:
            time.sleep(0.01)
        board(one).set_progress(f"student.{STUDENT_SHARDS}", 5)

    thread = threading.Thread(target=student)
    thread.start()
    receipts = one({"kind": ["shard"], "shard": [1], "position": [1]})
    thread.join()
    assert receipts["outcome"] == ["labelled", "labelled"] and writer.asked == [0, 1]
    assert 0.25 < sum(receipts["blocked_s"]) < 2 and sum(receipts["idle_s"]) < 0.2


def test_a_shard_that_came_too_early_does_not_keep_an_earlier_one_back(store: LocalStore, writer: Writer) -> None:
    """Of two calls at once, the one that must wait for the student may be the first to run."""
    one = actor(store, ahead=1)
    writer.during_commit = lambda shard: board(one).set_progress(f"student.{STUDENT_SHARDS}", shard + 1)
    with ThreadPoolExecutor(2) as calls:
        late = calls.submit(call, one, 1)
        time.sleep(0.3)
        assert not late.done(), "the control: it waits"
        assert calls.submit(call, one, 0).result(20) == [(16, "labelled")] == late.result(20)
    assert writer.asked == [0, 1]


def test_a_student_that_will_not_come_ends_the_labelling(store: LocalStore, writer: Writer) -> None:
    one = actor(store, ahead=1)
    board(one).abort("the student died")
    with pytest.raises(ResumableError, match="labelling stopped: the student died"):
        call(one, 1)


def test_the_teacher_answers_while_the_last_shard_is_committed(store: LocalStore, writer: Writer) -> None:
    one, second_asked, asking = actor(store), threading.Event(), []

    def during_ask(shard: int) -> None:
        asking.append(shard)
        assert len(asking) == 1, "the teacher is asked about one shard at a time"
        second_asked.set() if shard == 2 else time.sleep(0.2)
        asking.remove(shard)

    writer.during_ask = during_ask
    writer.during_commit = lambda shard: None if shard == 2 else assert_true(second_asked.wait(10))
    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(call, one, 1)
        time.sleep(0.05)
        second = calls.submit(call, one, 2)
        assert first.result() == second.result() == [(16, "labelled")]
    assert writer.asked == [1, 2] and set(writer.records) == {1, 2}


def assert_true(value: bool) -> None:
    assert value, "shard 2 was asked about while shard 1 was being committed"


def test_a_receipt_leaves_when_its_shard_is_committed(store: LocalStore, writer: Writer) -> None:
    one = actor(store)

    def fail(shard: int) -> None:
        raise OSError("disk full")

    writer.during_commit = fail
    with pytest.raises(OSError, match="disk full"):
        call(one, 1)
