"""How a storage in S3 keeps to it: copies on a node, pieces of large files, and requests that go wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentFault, IntegrityError, LockedError
from orchestrator.store import bucket
from orchestrator.store.records import describe_folder
from orchestrator.store.s3 import S3Store, node_folder
from tests.contracts.stored import FILES, build, damage, eventually, read
from tests.s3 import BUCKET, Fault, Proxy, Server, Spoil


def spoil(spoiled: Proxy, method: str, fragment: str, how: Spoil, times: int = 1) -> Fault:
    spoiled.faults.append(Fault(method, fragment, how, times))
    return spoiled.faults[-1]


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


def test_a_workspace_is_not_stored_by_who_has_lost_its_lock(s3: S3Store) -> None:
    def lost() -> None:
        raise LockedError("lost")

    s3.replace("runs/a/log", b"theirs")
    with pytest.raises(LockedError), s3.workspace("runs/a", ("log",), lost) as folder:
        (folder / "log").write_bytes(b"ours")
    assert s3.read("runs/a/log") == b"theirs"


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
