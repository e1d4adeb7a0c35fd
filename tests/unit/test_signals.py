"""Ctrl-C and SIGTERM are heard once; whatever comes later does not disturb what the first one started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestrator.cli import _say_stopped as say_stopped
from orchestrator.errors import Terminated
from orchestrator.runtime.signals import heed_signals, signals_heeded, undisturbed

BEFORE = signal.default_int_handler


@pytest.fixture(autouse=True)
def _own_handlers() -> object:
    before = {number: signal.signal(number, BEFORE) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("first", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_only_the_first_is_heard(first: signal.Signals, error: type[BaseException]) -> None:
    closed = False
    with pytest.raises(error), signals_heeded():
        try:
            signal.raise_signal(first)
        finally:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
            closed = True
    assert closed and signal.getsignal(signal.SIGINT) is BEFORE, "the program's own handlers are back"
    with pytest.raises(error), signals_heeded():  # and the next block hears again
        signal.raise_signal(first)


def test_a_block_within_a_block_ends_nothing() -> None:
    with signals_heeded():
        with signals_heeded(), undisturbed():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with signals_heeded():
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_heeded():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_leave_signals_alone() -> None:
    seen = []

    def work() -> None:
        with signals_heeded(), undisturbed():
            heed_signals()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [BEFORE]


def test_a_sigterm_stays_one_where_a_library_makes_a_plain_interrupt_of_it() -> None:
    """As `ray.get` does, which loses every other exception of a handler."""
    with pytest.raises(Terminated), signals_heeded():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None
    with pytest.raises(KeyboardInterrupt) as caught, signals_heeded():
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Terminated)


def test_the_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    say_stopped("interrupted", ["run", "my job.yaml", "--set", "objective.alpha=0.5"])
    said = capsys.readouterr().err
    assert said.endswith("distill run 'my job.yaml' --set objective.alpha=0.5\n") and said.count("\n") == 1 and "kept" in said
    say_stopped("interrupted", ["logs", "x", "-f"])
    assert capsys.readouterr().err == "interrupted\n", "there is nothing to go on with"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_commands_exit_code(number: signal.Signals, code: int) -> None:
    """Three signals within a second, of which the first comes while a verb is at work."""
    program = """
import sys, time
import orchestrator.cli as cli, orchestrator.spec.load as load
def work(*_):
    print("ready", flush=True)
    time.sleep(60)
load.load_job, sys.argv = work, ["distill", "run", "job.yaml"]
cli.main()
"""
    command = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None and command.stdout.readline() == "ready\n"
    for _ in range(3):
        os.kill(command.pid, number)
        time.sleep(0.01)
    _, said = command.communicate(timeout=60)
    assert (command.returncode, len(said.splitlines())) == (code, 1), said


SWALLOWS = """
import os, signal, sys, time
from orchestrator.cli import app, main

@app.command()
def swallow():
    try:
        {happens}
    except BaseException as error:
        raise ValueError("the class could not be built") from error

sys.argv = ["distill", "swallow"]
main()
"""


@pytest.mark.parametrize(
    ("happens", "code", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(5)", 130, "interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)", 143, "terminated"),
        ("raise OSError", 1, "the class could not be built"),
    ],
)
def test_an_interrupt_of_which_a_library_made_an_error_is_one(happens: str, code: int, says: str) -> None:
    """Without a signal, the negative control, the error is a fault of the program."""
    ended = subprocess.run(
        [sys.executable, "-c", SWALLOWS.format(happens=happens)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == code and says in ended.stderr, ended.stderr
    assert ("Traceback" in ended.stderr) == (code == 1)
