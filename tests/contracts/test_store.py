"""What every storage keeps to, a directory and S3 alike, and how S3 keeps to it when requests go wrong."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EnvironmentFault, IntegrityError, LockedError
from orchestrator.store import bucket, lease, mirror
from orchestrator.store.files import Store, local_folder, open_store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import describe_folder, finish_model, finished_model
from orchestrator.store.s3 import S3Store, node_folder
from tests.s3 import BUCKET, Fault, Proxy, Server, Spoil, proxy, s3_server
from tests.unit.test_label_log import IDENTITY, labels_of, manifest_of, tokens_of

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 100, "part/empty": b"", "part/a b+c": b"x"}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as running:
        yield running


@pytest.fixture
def environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """That of a machine that may use the server, with a folder for copies of its own."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    point_at(server, monkeypatch)
    yield monkeypatch
    bucket._client.cache_clear()


def point_at(server: Server | Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket._client.cache_clear()


@pytest.fixture
def s3(environment: pytest.MonkeyPatch) -> S3Store:
    return S3Store(f"s3://{BUCKET}/{uuid.uuid4().hex}/deep")


@pytest.fixture
def spoiled(s3: S3Store, server: Server, environment: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What `s3` talks to from now on."""
    environment.setattr(bucket, "FIRST_PAUSE_S", 0.01)
    environment.setattr(bucket, "PAUSES_S", (0.01, 0.01, 0.01))
    with proxy(server) as running:
        point_at(running, environment)
        yield running


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store") if request.param == "directory" else request.getfixturevalue("s3")


def spoil(spoiled: Proxy, method: str, fragment: str, how: Spoil, times: int = 1) -> Fault:
    spoiled.faults.append(Fault(method, fragment, how, times))
    return spoiled.faults[-1]


def build(store: Store, key: str, files: dict[str, bytes]) -> None:
    with store.folder_for(key) as folder:
        write(folder, files)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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


def damage(store: Store, server: Server, key: str, content: bytes) -> None:
    """Change a stored file behind the back of `store`."""
    if isinstance(store, LocalStore):
        store.path(key).write_bytes(content)
    else:
        server.write(store.address(key).removeprefix(f"s3://{BUCKET}/"), content)


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


def eventually(condition: Callable[[], Any], patience_s: float = 30.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


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
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "STALE_S", 1.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)


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
    with store.exclusive("another/lock") as still_ours:
        still_ours()


def test_a_lock_is_freed_by_its_holder_or_by_his_death(store: Store, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    for _ in range(2):
        with store.exclusive("run/lock") as still_ours:
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


def test_a_workspace_is_not_stored_by_who_has_lost_its_lock(s3: S3Store) -> None:
    def lost() -> None:
        raise LockedError("lost")

    s3.replace("runs/a/log", b"theirs")
    with pytest.raises(LockedError), s3.workspace("runs/a", ("log",), lost) as folder:
        (folder / "log").write_bytes(b"ours")
    assert s3.read("runs/a/log") == b"theirs"


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


# The label log, wherever it lies.


def test_a_label_log_is_written_followed_and_sealed(store: Store) -> None:
    log, shards = LabelLog.open(store, IDENTITY), [tokens_of(shard) for shard in range(3)]
    assert log.missing([2, 0, 1]) == [2, 0, 1] and log.committed(0) is None
    for shard, tokens in enumerate(shards):
        record = log.commit(shard, tokens, labels_of(tokens, salt=1))
        assert log.commit(shard, tokens, labels_of(tokens, salt=2)) == record, "the first commit wins"
        assert log.read(shard, record, tokens) == labels_of(tokens, salt=1)
    assert log.missing([2, 0, 1]) == [] and [shard for shard, _ in log.verify()] == [0, 1, 2]
    log.keep("basis", b"kept")
    assert log.kept("basis") == b"kept"
    seal, ledger = log.seal([0, 1, 2], manifest_of(shards))
    assert ledger.balanced and seal.rows == 12


# Copies on a node.


def test_a_folder_is_copied_once_for_all_processes_of_a_node(s3: S3Store, spoiled: Proxy, tmp_path: Path) -> None:
    build(s3, "model", FILES)
    spoiled.seen.clear()
    look = f"import tempfile; tempfile.tempdir = {str(tmp_path / 'node')!r}\n"
    look += f"from orchestrator.store.files import local_folder; print(local_folder({s3.address('model')!r}))"
    looking = [subprocess.Popen([sys.executable, "-c", look], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    copies = {process.communicate()[0].strip() for process in looking}
    assert copies == {str(s3.local("model"))} and read(s3.local("model")) == FILES
    assert [path for _, path in spoiled.seen if path.endswith("/model/model.safetensors")] == [
        path for method, path in spoiled.seen if method == "GET" and path.endswith("/model/model.safetensors")
    ]
    assert sum(path.endswith("/model/model.safetensors") for _, path in spoiled.seen) == 1
    s3.forget("model")
    assert not Path(copies.pop()).exists()


def test_a_copy_that_is_not_what_was_stored_is_refused(s3: S3Store, server: Server) -> None:
    build(s3, "model", FILES)
    damage(s3, server, "model/part/a b+c", b"y")
    with pytest.raises(IntegrityError, match=r"model/part/a b\+c: sha256 mismatch"):
        s3.local("model")
    server.client.delete_object(Bucket=BUCKET, Key=s3.address("model/config.json").removeprefix(f"s3://{BUCKET}/"))
    with pytest.raises(IntegrityError, match="gone"):
        s3.local("model")
    assert s3.contents("model") is None
    assert list((node_folder() / "copies").glob("*[!k]")) == [], "nothing half copied is left"


def test_large_files_travel_in_pieces(s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "CHUNK_BYTES", 5 << 20)  # the least that S3 takes
    files = {"large": os.urandom((12 << 20) + 17), "small": b"1"}
    build(s3, "model", files)
    assert read(s3.local("model")) == files
    assert s3.contents("model") == describe_folder(s3.local("model"))


# Requests that go wrong.


@pytest.mark.parametrize("how", ["lose the reply", "hang up", "500", "503", "409"])
def test_a_commit_survives_a_bad_reply(s3: S3Store, spoiled: Proxy, how: Spoil) -> None:
    fault = spoil(spoiled, "PUT", "/commit", how)
    assert s3.put_if_absent("commit", b"mine")
    assert fault.fired == 1
    assert not s3.put_if_absent("commit", b"theirs")
    assert s3.read("commit") == b"mine"


def test_a_lost_reply_does_not_hide_a_lost_race(s3: S3Store, spoiled: Proxy) -> None:
    s3.put_if_absent("commit", b"theirs")
    fault = spoil(spoiled, "PUT", "/commit", "lose the reply")
    assert not s3.put_if_absent("commit", b"mine")
    assert fault.fired == 1 and s3.read("commit") == b"theirs"


@pytest.mark.parametrize("how", ["lose the reply", "hang up", "500", "503"])
def test_everything_is_tried_again(s3: S3Store, spoiled: Proxy, how: Spoil) -> None:
    faults = [spoil(spoiled, method, "", how, times=2) for method in ("PUT", "GET", "HEAD")]
    s3.replace("a", b"1")
    assert s3.exists("a") and s3.read("a") == b"1"
    assert [fault.fired for fault in faults] == [2, 2, 2]
    spoiled.faults.clear()
    faults = [spoil(spoiled, "PUT", "/model/config.json", how), spoil(spoiled, "GET", "/model/config.json", how)]
    build(s3, "model", FILES)
    assert read(s3.local("model")) == FILES
    assert [fault.fired for fault in faults] == [1, 1]


def test_a_lease_survives_lost_replies(s3: S3Store, spoiled: Proxy, quick: None) -> None:
    fault = spoil(spoiled, "PUT", "/lock", "lose the reply", times=3)
    with s3.exclusive("run/lock") as still_ours:
        eventually(lambda: fault.fired == 3)
        time.sleep(0.5)
        still_ours()


def test_half_a_folder_is_not_seen(s3: S3Store, spoiled: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "RETRIES", 1)
    fault = spoil(spoiled, "PUT", "/model.index.json", "503", times=2)
    with pytest.raises(EnvironmentFault, match=re.escape(s3.address("model"))):
        build(s3, "model", FILES)
    assert fault.fired == 2
    assert s3.read("model/config.json") == FILES["config.json"], "the files are there, but"
    assert not s3.exists("model") and s3.keys("") == [] and s3.contents("model") is None
    build(s3, "model", FILES)
    assert read(s3.local("model")) == FILES


def assert_faulty(store: S3Store, *words: str) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        store.check_writable()
    assert caught.value.exit_code == 4
    message = str(caught.value)
    print(message)
    assert store.address() in message and all(word in message for word in words), message


def test_a_bucket_that_is_not_there_is_named(s3: S3Store) -> None:
    assert_faulty(S3Store("s3://no-such-bucket/x"), "no bucket", "no-such-bucket")


def test_a_forbidden_bucket_is_named(s3: S3Store, spoiled: Proxy) -> None:
    fault = spoil(spoiled, "PUT", "", "403")
    assert_faulty(s3, "denied")
    assert fault.fired == 1


def test_an_endpoint_that_does_not_answer_is_named(s3: S3Store, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    bucket._client.cache_clear()
    began = time.monotonic()
    assert_faulty(s3, "127.0.0.1:1")
    assert time.monotonic() - began < 15


def test_a_server_that_overwrites_commits_is_refused(s3: S3Store, spoiled: Proxy) -> None:
    s3.check_writable()
    spoiled.conditions = False
    assert_faulty(s3, "If-None-Match")
