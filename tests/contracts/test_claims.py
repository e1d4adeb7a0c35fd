"""Claims of several writers in one log, in a directory and on S3."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.store import claims
from orchestrator.store.claims import Claims
from orchestrator.store.files import Store
from orchestrator.store.local import LocalStore
from tests.contracts.stored import eventually

RENEW_S, STALE_S = 0.1, 1.0


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store") if request.param == "directory" else request.getfixturevalue("s3")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(claims, "RENEW_S", RENEW_S)
    monkeypatch.setattr(claims, "STALE_S", STALE_S)
    yield


def writer(store: Store, name: str) -> Claims:
    return Claims(store, "labels/k", name)


def test_a_claim_of_a_live_writer_holds(store: Store) -> None:
    one, other = writer(store, "one"), writer(store, "other")
    with one.kept_alive(), other.kept_alive():
        assert one.take("7", "a") and one.take("7", "a"), "taking it again changes nothing"
        assert not other.take("7", "b") and not one.take("7", "c"), "neither another run nor another process of the same"
        assert not other.is_free("7") and other.is_free("8") and one.is_free("7")
        time.sleep(2 * STALE_S)
        assert not other.take("7", "b"), "its heartbeat goes on"
        one.release("7")
        assert other.take("7", "b") and not one.take("7", "a")
    assert store.keys("labels/k/claims") == [] == one.writers(), "nothing is left"


def test_a_writer_that_ends_gives_its_claims_up(store: Store) -> None:
    one, other = writer(store, "one"), writer(store, "other")
    with other.kept_alive():
        with pytest.raises(KeyError), one.kept_alive():
            assert one.take("7", "a") and not other.take("7", "b")
            raise KeyError
        assert other.is_free("7") and other.take("7", "b")


KILLED = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[2]
from orchestrator.store import claims
from orchestrator.store.files import open_store
claims.RENEW_S = 0.1
own = claims.Claims(open_store(sys.argv[1]), "labels/k", "one")
with own.kept_alive():
    assert own.take("7", "a")
    print("taken", flush=True)
    time.sleep(600)
"""


def test_claims_of_a_killed_writer_are_taken_over(store: Store, tmp_path: Path) -> None:
    other = writer(store, "other")
    (tmp_path / "there").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, store.address(), str(tmp_path / "there")], stdout=subprocess.PIPE, text=True
    )
    with other.kept_alive():
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        time.sleep(2 * STALE_S)
        assert not other.take("7", "b"), "the control: it lives"
        process.kill()
        process.wait()
        died = time.monotonic()
        assert not other.take("7", "b"), "nobody knows yet"
        eventually(lambda: other.is_free("7"))
        assert time.monotonic() - died > STALE_S / 2
        assert other.take("7", "b") and other.writers() == ["other"]


def test_a_killed_run_that_comes_back_finds_its_claims_free(store: Store) -> None:
    one, other = writer(store, "one"), writer(store, "other")
    store.replace(one.heartbeat("one"), b"of the first attempt")
    with other.kept_alive():
        assert one.take("7", "a") and not other.take("7", "b")
        with one.kept_alive():
            assert other.take("7", "b"), "given up by the second attempt, whose processes have other names"
            assert not one.take("7", "c")


def test_of_eight_writers_one_has_it(store: Store) -> None:
    writers, barrier, taken = [writer(store, f"w{i}") for i in range(8)], threading.Barrier(8), []
    for one in writers:
        store.replace(one.heartbeat(one.writer), b"beats")

    def take(one: Claims) -> None:
        barrier.wait()
        if one.take("7", "a"):
            taken.append(one.writer)

    threads = [threading.Thread(target=take, args=(one,)) for one in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
