"""What every storage keeps to, a directory and S3 alike."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import LockedError
from orchestrator.store import mirror
from orchestrator.store.files import HeldElsewhere, Store, local_folder, open_store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import FileRecord, describe_folder, finish_model, finished_model
from tests.contracts.stored import FILES, build, damage, eventually, read, write
from tests.label_logs import IDENTITY, labels_of, manifest_of, tokens_of, verified
from tests.s3 import Server


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store") if request.param == "directory" else request.getfixturevalue("s3")


# Files.


def test_the_first_writer_wins_and_the_newest_version_wins(store: Store) -> None:
    assert store.put_if_absent("a/b", b"1")
    assert not store.put_if_absent("a/b", b"2")
    assert store.put_if_absent("a/b", b"1"), "a repeated write is no loss"
    assert store.read("a/b") == b"1"
    store.replace("a/b", b"3")
    store.replace("a/c", b"", private=True)
    assert (store.read("a/b"), store.read("a/c"), store.read_json("a/d")) == (b"3", b"", None)
    assert store.keys("a") == ["b", "c"]
    assert store.keys("nowhere") == []
    assert store.exists("a/b") and not store.exists("a/d")
    with pytest.raises(FileNotFoundError):
        store.read("a/d")
    with pytest.raises(FileNotFoundError):
        store.open("a/d")
    store.remove("a/b")
    store.remove("a/b")
    assert store.keys("a") == ["c"]


def test_of_eight_writers_one_wins(store: Store) -> None:
    barrier, won = threading.Barrier(8), {}

    def put(writer: int) -> None:
        barrier.wait()
        won[writer] = store.put_if_absent("commit", bytes([writer]) * 1000)

    for round_ in range(5):
        won.clear()
        threads = [threading.Thread(target=put, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won.values()) == [False] * 7 + [True], round_
        (winner,) = [writer for writer, has_won in won.items() if has_won]
        assert store.read("commit") == bytes([winner]) * 1000
        store.remove("commit")


def test_a_file_is_read_in_parts(store: Store) -> None:
    content = bytes(range(256)) * 1000
    store.replace("a", content)
    with store.open("a") as file:
        file.seek(-3, os.SEEK_END)
        assert (file.read(), file.tell()) == (content[-3:], len(content))
        file.seek(1000)
        assert file.read(10) == content[1000:1010]
        assert file.read() == content[1010:]


def test_a_store_travels(store: Store) -> None:
    store.replace("a", b"1")
    travelled = pickle.loads(pickle.dumps(store))
    assert travelled.read("a") == b"1" and travelled.address("a") == store.address("a")
    assert open_store(store.address()).read("a") == b"1"


def test_a_writable_storage_is_left_as_it_was(store: Store) -> None:
    store.check_writable()
    assert store.keys("") == []


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x"])
def test_keys_stay_under_the_root(store: Store, key: str) -> None:
    with pytest.raises(AssertionError):
        store.put_if_absent(key, b"")


# Folders.


def test_a_folder_is_there_when_it_is_finished(store: Store) -> None:
    with store.folder_for("stage/model") as folder:
        write(folder, FILES)
        assert not store.exists("stage/model") and store.contents("stage/model") is None
        with pytest.raises(FileNotFoundError):
            store.local("stage/model")
    assert store.exists("stage/model") and store.keys("stage") == ["model"]
    assert store.contents("stage/model") == describe_folder(store.local("stage/model"))
    assert read(store.local("stage/model")) == read(local_folder(store.address("stage/model"))) == FILES
    assert store.read("stage/model/config.json") == FILES["config.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_a_folder_is_for_umask_to_say(tmp_path: Path, umask: int, mode: int) -> None:
    """Not for the library that wrote a file (fault F: safetensors writes for its owner alone), nor for what it is a copy of."""
    store, before = LocalStore(tmp_path), os.umask(umask)
    try:
        with store.folder_for("stage/model") as folder:
            write(folder, FILES)
            (folder / "model.safetensors").chmod(0o600)
            (folder / "config.json").chmod(0o444)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((store.path("stage/model") / name).stat().st_mode) for name in FILES} == {mode}


def test_a_folder_that_fails_while_it_is_built_leaves_the_one_before(store: Store) -> None:
    build(store, "stage/model", FILES)

    def fail() -> None:
        with store.folder_for("stage/model") as folder:
            write(folder, {"config.json": b"other"})
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert read(store.local("stage/model")) == FILES
    build(store, "stage/model", {"config.json": b"other"})
    assert read(store.local("stage/model")) == {"config.json": b"other"}
    assert store.keys("stage") == ["model"]


def test_a_folder_of_several_parts_is_there_when_it_is_published(store: Store) -> None:
    parts = []
    for name, content in FILES.items():
        with store.part_of("checkpoints/step-1") as part:
            write(part.folder, {name: content})
        parts.append(pickle.loads(pickle.dumps(part)))
    assert store.keys("checkpoints") == [] and not store.exists("checkpoints/step-1")
    store.publish("checkpoints/step-1", parts)
    assert store.keys("checkpoints") == ["step-1"]
    assert read(store.local("checkpoints/step-1")) == FILES


def test_what_was_never_published_is_swept_away(store: Store, server: Server) -> None:
    build(store, "checkpoints/step-1", FILES)
    with store.part_of("checkpoints/step-2") as part:
        write(part.folder, FILES)
    store.replace("checkpoints/note", b"1")
    store.sweep("checkpoints")
    assert read(store.local("checkpoints/step-1")) == FILES and store.read("checkpoints/note") == b"1"
    if isinstance(store, LocalStore):
        assert sorted(p.name for p in store.path("checkpoints").iterdir()) == ["note", "step-1"]
    else:
        assert not [name for name in server.names() if "step-2" in name and store.address().split("/")[3] in name]


def test_a_removed_folder_is_gone_with_all_that_is_in_it(store: Store) -> None:
    for step in (1, 2):
        build(store, f"checkpoints/step-{step}", FILES)
    store.remove("checkpoints/step-1")
    assert store.keys("checkpoints") == ["step-2"]
    store.remove("checkpoints")
    store.remove("checkpoints")
    assert store.keys("checkpoints") == [] and store.contents("checkpoints/step-2") is None


@pytest.mark.parametrize("content", [b"", b'{"a": 2}', b'{"a": 1} '])
def test_a_damaged_model_is_not_finished(store: Store, server: Server, content: bytes) -> None:
    build(store, "student/k/model", FILES)
    model = finish_model(store, "student/k", 7, {})
    assert finished_model(store, "student/k") == model
    assert read(model.path) == FILES
    damage(store, server, "student/k/model/config.json", content)
    assert finished_model(store, "student/k") is None


def test_a_workspace_keeps_what_is_written_on_and_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "EVERY_S", 0.1)
    store.replace("runs/a/log", b"one\n")
    store.replace("runs/a/other", b"as it is")
    with store.workspace("runs/a", ("log", "state"), lambda: None) as folder:
        with (folder / "log").open("ab") as log:
            log.write(b"two\n")
        eventually(lambda: store.read("runs/a/log") == b"one\ntwo\n")
        (folder / "state").write_bytes(b"1")
    assert (store.read("runs/a/log"), store.read("runs/a/state")) == (b"one\ntwo\n", b"1")
    assert store.read("runs/a/other") == b"as it is"


def test_a_folder_is_fetched_file_by_file(store: Store) -> None:
    build(store, "stage/model", FILES)
    records = store.contents("stage/model")
    assert records is not None
    outline = store.outline("stage/model")
    assert {str(path.relative_to(outline)) for path in outline.rglob("*") if path.is_file()} == set(FILES)
    for name, content in FILES.items():
        assert store.fetch("stage/model", name).read_bytes() == (outline / name).read_bytes() == content
        assert store.holds("stage/model", {name: records[name]})
        assert not store.holds("stage/model", {name: records[name].model_copy(update={"sha256": "0" * 64})})
        assert not store.holds("stage/model", {f"{name}.other": records[name]})
    assert not store.holds("stage/other", records) and store.holds("stage/model", {})
    store.forget("stage/model")
    assert outline.is_dir() == isinstance(store, LocalStore), "no copy stays on the node"
    with pytest.raises(FileNotFoundError):
        store.outline("stage/other")


def test_files_that_a_part_has_described_are_not_hashed_again(store: Store) -> None:
    told = FileRecord(sha256="told", bytes=1)
    with store.part_of("stage/model") as part:
        write(part.folder, {"a": b"1", "b": b"2"})
        part.files["a"] = told
    assert part.files["a"] == told and part.files["b"] == FileRecord(sha256=hashlib.sha256(b"2").hexdigest(), bytes=1)


# Locks.

HOLDER = """
import sys, time
from orchestrator.errors import LockedError
from orchestrator.store import lease
from orchestrator.store.files import open_store
lease.RENEW_S, lease.STALE_S = 0.2, 1.5
with open_store(sys.argv[1]).exclusive("run/lock") as still_ours:
    print("held", flush=True)
    while True:
        time.sleep(0.1)
        try:
            still_ours()
        except LockedError as error:
            print(error, flush=True)
            break
"""


@pytest.fixture
def holder(store: Store, quick: None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, store.address()], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_the_lock(store: Store, holder: subprocess.Popen[str]) -> None:
    who = re.escape(f"{store.address('run')} is locked by ") + rf"\S+:{holder.pid} since 20"
    with pytest.raises(LockedError, match=who) as caught, store.exclusive("run/lock"):
        raise AssertionError("entered")
    assert caught.value.exit_code == 7
    assert store.held("run/lock") and not store.held("another/lock")
    with store.exclusive("another/lock") as still_ours:
        still_ours()


def test_a_lock_is_freed_by_its_holder_or_by_his_death(store: Store, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    eventually(lambda: not store.held("run/lock"))
    for _ in range(2):
        with store.exclusive("run/lock") as still_ours:
            assert store.held("run/lock")
            time.sleep(0.5)
            still_ours()
            with pytest.raises(LockedError, match=f":{os.getpid()} since"), store.exclusive("run/lock"):
                raise AssertionError("entered")


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_holder_that_slept_too_long_learns_that_it_has_lost(store: Store, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGSTOP)
    with store.exclusive("run/lock") as still_ours:
        holder.send_signal(signal.SIGCONT)
        assert holder.stdout is not None
        assert f":{os.getpid()} since" in holder.stdout.readline(), "it names who has it now"
        holder.wait()
        time.sleep(0.5)
        still_ours()  # its going has freed nothing


def test_what_a_lock_guarded_is_not_published_once_it_is_anothers(store: Store, quick: None) -> None:
    """The driver holds the lock, a worker asks for it: another process, perhaps on another node."""
    with store.exclusive("run/lock") as first:
        worker: HeldElsewhere = pickle.loads(pickle.dumps(HeldElsewhere(store, "run/lock", first.token)))
        time.sleep(0.5)  # it is renewed under the same token
        worker()
        with store.folder_for("stage/model", worker) as folder:
            write(folder, FILES)
    with store.exclusive("run/lock") as second:
        assert second.token != first.token
        for check in (worker, HeldElsewhere(store, "never/lock", first.token)):
            with pytest.raises(LockedError, match="is locked by"), store.folder_for("stage/other", check) as folder:
                write(folder, FILES)
        HeldElsewhere(store, "run/lock", second.token)()
    assert store.keys("stage") == ["model"], "what was published before stays, what came too late is not seen"


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_lease_that_was_taken_over_fences_the_workers_of_the_sleeper(
    store: Store, holder: subprocess.Popen[str], quick: None
) -> None:
    token = json.loads(store.read("run/lock"))["id"]
    worker = HeldElsewhere(store, "run/lock", token)
    worker()
    holder.send_signal(signal.SIGSTOP)
    with store.exclusive("run/lock"):
        with pytest.raises(LockedError, match=f":{os.getpid()} since"), store.folder_for("stage/model", worker) as folder:
            write(folder, FILES)
        assert not store.exists("stage/model")


def test_of_eight_that_want_a_lock_one_gets_it(store: Store, quick: None) -> None:
    barrier, entered, refused = threading.Barrier(8), [], []

    def take(who: int) -> None:
        barrier.wait()
        try:
            with store.exclusive("run/lock"):
                entered.append(who)
                time.sleep(3)
        except LockedError:
            refused.append(who)

    threads = [threading.Thread(target=take, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 7)


# Parts of files.


def test_a_range_is_read_by_itself(store: Store) -> None:
    store.put_if_absent("file", bytes(range(100)))
    assert store.read_range("file", 0, 100) == bytes(range(100))
    assert store.read_range("file", 30, 5) == bytes(range(30, 35))
    assert store.read_range("file", 95, 50) == bytes(range(95, 100)), "the file ends before"
    with pytest.raises(FileNotFoundError):
        store.read_range("other", 0, 1)


# The label log, wherever it lies.


def test_a_label_log_is_written_followed_and_sealed(store: Store) -> None:
    log, shards = LabelLog.open(store, IDENTITY), [tokens_of(shard) for shard in range(3)]
    assert log.missing([2, 0, 1]) == [2, 0, 1] and log.committed(0) is None
    for shard, tokens in enumerate(shards):
        record = log.commit(shard, tokens, labels_of(tokens, salt=1))
        assert log.commit(shard, tokens, labels_of(tokens, salt=2)) == record, "the first commit wins"
        assert log.read(shard, record, tokens) == labels_of(tokens, salt=1)
    assert log.missing([2, 0, 1]) == [] and [shard for shard, _ in verified(log)] == [0, 1, 2]
    log.keep("basis", b"kept")
    assert log.kept("basis") == b"kept"
    seal, ledger = log.seal([0, 1, 2], manifest_of(store, shards))
    assert ledger.balanced and seal.rows == 12
