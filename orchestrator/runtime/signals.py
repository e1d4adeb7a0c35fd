"""Ctrl-C and SIGTERM: heard once, after which nothing disturbs the closing of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from orchestrator.errors import Terminated

_STOPS: dict[signal.Signals, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
"""Both are a `KeyboardInterrupt`: whatever else a handler raises, `ray.get` loses."""
_terminated = threading.Event()
_heard: list[type[KeyboardInterrupt]] = []


def heed_signals() -> None:
    """From now on the first SIGINT raises `KeyboardInterrupt` or the first SIGTERM `Terminated`; all later ones are ignored.

    Whoever presses Ctrl-C three times wants the run to stop, and stopping takes seconds that must not be disturbed. A signal
    that is ignored already, as in a shell's background job, stays so.
    """
    _heard.clear()
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


@contextmanager
def signals_heeded() -> Generator[None]:
    """`heed_signals` inside the block; afterwards what the program had before, unless that was the same.

    Raises `Terminated` where a wait for Ray has made a plain `KeyboardInterrupt` of a SIGTERM.
    """
    before = {number: signal.getsignal(number) for number in _STOPS}
    _terminated.clear()
    heed_signals()
    try:
        yield
    except KeyboardInterrupt as stop:
        if _terminated.is_set() and not isinstance(stop, Terminated):
            raise Terminated from stop
        raise
    finally:
        if _stop not in before.values() and threading.current_thread() is threading.main_thread():
            _heard.clear()
            for number, handler in before.items():
                signal.signal(number, handler)


def heard() -> KeyboardInterrupt | None:
    """Return the interrupt that a signal has raised in this process, None if there was no signal.

    A library may have made another exception of it: one that arrives while pydantic builds a class ends as its `SchemaError`.
    """
    return _heard[0]() if _heard else None


@contextmanager
def undisturbed() -> Generator[None]:
    """Ignore both signals inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in _STOPS:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGTERM:
        _terminated.set()
    _heard.append(_STOPS[signal.Signals(number)])
    raise _STOPS[signal.Signals(number)]
