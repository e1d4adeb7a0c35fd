"""Whatever the disk does, or whoever kills the writer: the label log has all of a shard or nothing."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EnvironmentFault
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from tests.label_logs import labels_of, temporary_files, tokens_of, verified

pytestmark = pytest.mark.slice

ERRNOS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE]


def test_temporary_files_are_invisible(log: LabelLog) -> None:
    record = log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
    for folder in ("data", "commits"):
        log.store.path(f"{log.folder}/{folder}/.tmp-0123456789ab").write_bytes(b'{"sha256":')
    assert log.missing([0, 1]) == [1]
    assert log.all_committed() == verified(log) == [(0, record)]


KILLED_WRITER = """
import itertools, os, signal, sys
sys.path.insert(0, sys.argv[1])
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from tests.label_logs import IDENTITY, labels_of, tokens_of
log = LabelLog.open(LocalStore(sys.argv[2]), IDENTITY)
name, nth, calls = sys.argv[3], int(sys.argv[4]), itertools.count(1)
real = getattr(os, name)
def dying(*args, **kwargs):
    if next(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, name, dying)
log.commit(0, tokens_of(0), labels_of(tokens_of(0)))
"""


@pytest.mark.parametrize(("call", "nth"), [("fsync", 1), ("link", 1), ("fsync", 2), ("fsync", 3), ("link", 2), ("fsync", 4)])
def test_a_writer_killed_anywhere_leaves_all_or_nothing(log: LabelLog, call: str, nth: int) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(Path(__file__).parents[2]), str(log.store.root), call, str(nth)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL, "the fault has fired"
    tokens = tokens_of(0)
    assert log.missing([0]) == ([] if (call, nth) == ("fsync", 4) else [0]), "the second link is the commit"
    record = log.commit(0, tokens, labels_of(tokens, salt=0))
    assert log.read(0, record, tokens) == labels_of(tokens)
    assert verified(log) == [(0, record)]


class Fault:
    """The `nth` call of one system call on the way of a commit fails with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: str, nth: int, code: int) -> None:
        self.fired = False
        self._nth, self._code, self._calls = nth, code, itertools.count(1)
        if site in ("link", "fsync"):
            monkeypatch.setattr(os, site, self._failing(getattr(os, site)))
        elif site == "rename":
            monkeypatch.setattr(Path, "replace", self._failing(Path.replace))
        else:
            monkeypatch.setattr(Path, "open", self._opening(site, Path.open))

    def _fail(self) -> None:
        self.fired = True
        raise OSError(self._code, os.strerror(self._code))

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._fail() if next(self._calls) == self._nth else real(*args, **kwargs)

        return call

    def _opening(self, site: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_(path: Path, *args: Any, **kwargs: Any) -> Any:
            if not path.name.startswith(".tmp") or next(self._calls) != self._nth:
                return real(path, *args, **kwargs)
            if site == "open":
                self._fail()
            file = real(path, "xb", buffering=0)
            return HalfWritten(file, self._fail)

        return open_


class HalfWritten:
    """A file that takes half of what is written and then fails."""

    def __init__(self, file: Any, fail: Callable[[], None]) -> None:
        self._file, self._fail = file, fail

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._fail()


SITES = [("open", 1), ("write", 1), ("fsync", 1), ("link", 1), ("fsync", 2)]
SITES += [("open", 2), ("write", 2), ("fsync", 3), ("link", 2), ("fsync", 4)]
"""Every call of a commit, in order: the first five put the data file, the others the commit record."""


@pytest.mark.parametrize("code", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize(("site", "nth"), SITES)
def test_a_failing_disk_leaves_all_or_nothing(log: LabelLog, site: str, nth: int, code: int) -> None:
    tokens = tokens_of(0)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, site, nth, code)
        with pytest.raises(EnvironmentFault) as caught:
            log.commit(0, tokens, labels_of(tokens))
    assert fault.fired
    assert caught.value.exit_code == 4
    first_half = SITES.index((site, nth)) < 5
    path = log.store.path(f"{log.folder}/{'data/000000-' if first_half else 'commits/000000.json'}")
    assert str(path) in str(caught.value)
    assert ("disk full" if code in (errno.ENOSPC, errno.EDQUOT) else os.strerror(code)) in str(caught.value)
    assert temporary_files(log.store) == []
    if (site, nth) == ("fsync", 4):  # the record is linked and whole; only that it would survive a power cut is unsure
        assert verified(log) == [(0, log.committed(0))]
    else:
        assert log.committed(0) is None
        assert log.missing([0]) == [0]
    record = log.commit(0, tokens, labels_of(tokens))
    assert log.read(0, record, tokens) == labels_of(tokens)
    assert temporary_files(log.store) == []


@pytest.mark.parametrize("code", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("site", ["open", "write", "fsync", "rename"])
def test_a_failing_disk_keeps_the_version_before(store: LocalStore, site: str, code: int) -> None:
    store.replace("run.json", b"old")
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, site, 1, code)
        with pytest.raises(EnvironmentFault, match=re.escape(str(store.path("run.json")))):
            store.replace("run.json", b"new")
    assert fault.fired
    assert store.read("run.json") == b"old"
    assert temporary_files(store) == []
    store.replace("run.json", b"new")
    assert store.read("run.json") == b"new"


def test_a_failing_read_names_the_file(log: LabelLog, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(0)
    record = log.commit(0, tokens, labels_of(tokens))

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(EnvironmentFault, match=re.escape(record.file)):
        log.read(0, record, tokens)
