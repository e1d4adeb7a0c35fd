"""The lock of a run directory: one process holds it, others are told who, and its death frees it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentFault, LockedError
from orchestrator.store.lock import exclusive, held

HOLDER = """
import sys, time
from pathlib import Path
from orchestrator.store.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    who = re.escape(f"{tmp_path / 'run'} is locked by {socket.gethostname()}:{holder.pid} since 20")
    for _ in range(2):
        with pytest.raises(LockedError, match=who) as caught, exclusive(tmp_path / "run" / "lock"):
            raise AssertionError("entered")
        assert caught.value.exit_code == 7
    assert holder.poll() is None
    with exclusive(tmp_path / "another" / "lock"):
        pass


def test_to_look_keeps_nobody_from_the_lock(tmp_path: Path) -> None:
    """`distill runs`, again and again, while a run starts."""
    lock, stop = tmp_path / "run" / "lock", threading.Event()
    seen: set[bool] = set()

    def look() -> None:
        while not stop.is_set():
            seen.add(held(lock))

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            with exclusive(lock):
                assert held(lock)
    finally:
        stop.set()
        for looker in lookers:
            looker.join()
    assert seen == {True, False} and not held(lock)


def test_a_killed_holder_frees_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with (
        exclusive(tmp_path / "run" / "lock"),
        pytest.raises(LockedError, match=f":{os.getpid()} since"),
        exclusive(tmp_path / "run" / "lock"),
    ):
        raise AssertionError("entered")
    with exclusive(tmp_path / "run" / "lock"):
        pass


def test_a_lock_that_cannot_be_made_is_a_fault_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=re.escape(str(tmp_path / "file"))), exclusive(tmp_path / "file" / "lock"):
        raise AssertionError("entered")
