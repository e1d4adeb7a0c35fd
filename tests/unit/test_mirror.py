"""Logs in a storage that knows only whole files: nothing is lost at a kill, and little travels."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.store import mirror
from orchestrator.store.local import LocalStore
from orchestrator.store.mirror import _Mirror, mirrored

NAME = "metrics.jsonl"


class Metered(LocalStore):
    """A storage that counts the bytes that travel to it."""

    written = 0

    def replace(self, key: str, data: bytes, private: bool = False) -> None:
        self.written += len(data)
        super().replace(key, data, private)


@pytest.fixture
def metered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Metered:
    monkeypatch.setattr(mirror, "LARGE_BYTES", 1000)
    return Metered(tmp_path / "store")


def opened(store: LocalStore, folder: Path) -> _Mirror:
    """As a process that starts does."""
    folder.mkdir()
    found = _Mirror(store, "runs/a", folder)
    found.fetch(NAME)
    return found


def test_a_killed_process_loses_nothing_that_was_stored(metered: Metered, tmp_path: Path) -> None:
    written, line = b"", b"x" * 99 + b"\n"
    for life in range(4):
        folder = tmp_path / f"life-{life}"
        mirrored_now = opened(metered, folder)
        assert not written or (folder / NAME).read_bytes() == written
        for _ in range(25):
            with (folder / NAME).open("ab") as log:
                log.write(line)
            written += line
            mirrored_now.store_changes()
    assert len(written) == 10_000
    assert metered.written < 10 * len(written), "whole each time, it would have been 51 times as much"
    assert metered.exists(f"runs/a/{NAME}.tail")
    with mirrored(metered, "runs/a", (NAME,), lambda: None, tmp_path) as folder:
        assert (folder / NAME).read_bytes() == written
    assert metered.read(f"runs/a/{NAME}") == written and not metered.exists(f"runs/a/{NAME}.tail")


def test_a_tail_that_the_file_holds_by_now_is_not_added_again(metered: Metered, tmp_path: Path) -> None:
    """A process that is killed after it stored the whole file and before it removed the tail."""
    mirrored_now = opened(metered, tmp_path / "first")
    log = tmp_path / "first" / NAME
    log.write_bytes(b"a\n" * 600)
    mirrored_now.store_changes()
    log.write_bytes(b"a\n" * 600 + b"b\n")
    mirrored_now.store_changes()
    assert metered.read(f"runs/a/{NAME}.tail") == b"1200\nb\n"
    metered.replace(f"runs/a/{NAME}", log.read_bytes())
    opened(metered, tmp_path / "second")
    assert (tmp_path / "second" / NAME).read_bytes() == b"a\n" * 600 + b"b\n"


def test_a_file_that_became_shorter_is_stored_whole(metered: Metered, tmp_path: Path) -> None:
    mirrored_now = opened(metered, tmp_path / "first")
    for data in (b"a\n" * 600, b"a\n" * 600 + b"b", b"c\n" * 500):
        (tmp_path / "first" / NAME).write_bytes(data)
        mirrored_now.store_changes()
    opened(metered, tmp_path / "second")
    assert (tmp_path / "second" / NAME).read_bytes() == b"c\n" * 500


def test_other_files_are_stored_whole(metered: Metered, tmp_path: Path) -> None:
    mirrored_now = opened(metered, tmp_path / "first")
    for content in (b"a" * 2000, b"b" * 2100):
        (tmp_path / "first" / "state.json").write_bytes(content)
        mirrored_now.store_changes()
        assert metered.read("runs/a/state.json") == content
    assert metered.keys("runs/a") == ["state.json"]
