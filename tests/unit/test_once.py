"""Work that two runs want at once is done by one of them, and a run whose maker gave up makes it itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import ResumableError
from orchestrator.store import once
from orchestrator.store.files import Lock
from orchestrator.store.local import LocalStore
from orchestrator.store.once import Made, Waiting, make_once


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "LOOK_EVERY_S", 0.05)


class Work:
    """Makes a file, slowly, and counts how often it is made."""

    def __init__(self, store: LocalStore, fail: bool = False) -> None:
        self.store, self.fail = store, fail
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.times = 0

    def finished(self) -> str | None:
        return self.store.read("made").decode() if self.store.exists("made") else None

    def make(self, lock: Lock) -> str:
        self.times += 1
        self.begun.set()
        assert self.may_end.wait(20)
        lock()
        if self.fail:
            raise ValueError("given up")
        self.store.put_if_absent("made", b"it")
        return "it"


def run_both(tmp_path: Path, fail: bool) -> tuple[list[str], list[Made[str] | Exception], Work, Work]:
    store = LocalStore(tmp_path)
    first, second = Work(store, fail), Work(store)
    second.may_end.set()
    said: list[str] = []
    found: list[Made[str] | Exception] = [ValueError("not run")] * 2

    def go(place: int, work: Work) -> None:
        try:
            found[place] = make_once(store, "lock", work.finished, work.make, Waiting(said.append))
        except ValueError as error:
            found[place] = error

    threads = [threading.Thread(target=go, args=(place, work)) for place, work in enumerate((first, second))]
    threads[0].start()
    assert first.begun.wait(20)
    threads[1].start()
    while not said:
        time.sleep(0.01)
    time.sleep(0.2)
    first.may_end.set()
    for thread in threads:
        thread.join(20)
    return said, found, first, second


def test_the_second_waits_and_takes_the_result(tmp_path: Path) -> None:
    said, found, first, second = run_both(tmp_path, fail=False)
    assert found == [Made("it", here=True), Made("it", here=False)]
    assert (first.times, second.times) == (1, 0)
    assert len(said) == 1 and "is locked by" in said[0] and said[0].endswith("waiting for its result")


def test_the_second_makes_it_where_the_first_gave_up(tmp_path: Path) -> None:
    _, found, first, second = run_both(tmp_path, fail=True)
    assert str(found[0]) == "given up" and found[1] == Made("it", here=True)
    assert (first.times, second.times) == (1, 1)


def test_a_wait_ends_with_the_run(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    work = Work(store)
    ending = Waiting(lambda _: None, lambda: "the teacher failed")
    with store.exclusive("lock"), pytest.raises(ResumableError, match="stopped waiting for another run: the teacher failed"):
        make_once(store, "lock", work.finished, work.make, ending)
    assert work.times == 0


def test_a_finished_result_needs_no_lock(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent("made", b"it")
    work = Work(store)
    with store.exclusive("lock"):
        assert make_once(store, "lock", work.finished, work.make, Waiting(print)) == Made("it", here=False)
