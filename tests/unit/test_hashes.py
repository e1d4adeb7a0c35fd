"""Remembered hashes: what has not changed is not read again, and what has changed is, however well it hides."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from orchestrator.store import hashes
from orchestrator.store.hashes import describe_known
from orchestrator.store.local import LocalStore
from orchestrator.store.records import describe_folder

NAMES = ["a", "b", "part/c"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "part").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "model" / name).write_bytes(name.encode() * 1000)
    return tmp_path / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read from now on."""
    found: list[str] = []

    def sha256_of(path: Path) -> str:
        found.append(path.name)
        return original(path)

    original = hashes.sha256_of
    monkeypatch.setattr(hashes, "sha256_of", sha256_of)
    return found


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that has been written so far count as old."""
    monkeypatch.setattr(hashes, "SETTLED_S", -3600.0)


def test_only_what_has_changed_is_read(
    store: LocalStore, folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    assert describe_known(store, folder, NAMES) == describe_folder(folder) and sorted(read) == ["a", "b", "c"]
    read.clear()
    assert describe_known(store, folder, NAMES) == describe_folder(folder) and read == []
    (folder / "b").write_bytes(b"other")
    assert describe_known(store, folder, NAMES) == describe_folder(folder) and read == ["b"]
    read.clear()
    assert describe_known(store, folder, ["a"]) == describe_folder(folder, ["a"]) and read == []
    assert describe_known(store, folder, NAMES) == describe_folder(folder) and read == [], "the others are not forgotten"


def test_a_change_that_hides_its_time_is_seen(
    store: LocalStore, folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    before = describe_known(store, folder, NAMES)
    stat = (folder / "a").stat()
    (folder / "a").write_bytes(b"z" * stat.st_size)
    os.utime(folder / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / "a").stat().st_mtime_ns == stat.st_mtime_ns, "the control: by size and time it is the same"
    after = describe_known(store, folder, NAMES)
    assert after == describe_folder(folder) != before


def test_a_file_that_was_just_written_is_not_remembered(
    store: LocalStore, folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        read.clear()
        describe_known(store, folder, NAMES)
        assert sorted(read) == ["a", "b", "c"]
    monkeypatch.setattr(hashes, "SETTLED_S", 0.05)
    time.sleep(0.2)
    describe_known(store, folder, NAMES)
    read.clear()
    describe_known(store, folder, NAMES)
    assert read == []


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    original = hashes.sha256_of

    def slow(path: Path) -> str:
        digest = original(path)
        path.write_bytes(b"meanwhile")
        return digest

    monkeypatch.setattr(hashes, "sha256_of", slow)
    describe_known(store, folder, ["a"])
    monkeypatch.setattr(hashes, "sha256_of", original)
    assert describe_known(store, folder, ["a"]) == describe_folder(folder, ["a"])
