"""Row groups read in a process of its own, so that decoding takes no time from the interpreter that trains.

The process imports no torch and is there within half a second. It is fed through its standard input and ends when that does,
so it never outlives the worker that started it, however that one dies.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from orchestrator.errors import ResumableError
from orchestrator.labels.groups import Group, GroupReader, GroupSource

DEATHS = 3
"""So often the process may die before training gives up on it."""
START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from orchestrator.student.decoder import serve
serve()
"""


class Decoder:
    """Reads row groups of `source`, one after another, in the order in which they are asked for."""

    def __init__(self, source: GroupSource) -> None:
        self._source = source
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._deaths, self._closed, self._replacing = 0, False, threading.Lock()
        self._process = self._start()

    def group(self, shard: int, group: int) -> Future[Group]:
        """A row group of a committed shard; the future raises what reading it raised, as `GroupReader.read` does.

        It raises `ResumableError` if the process dies again and again.
        """
        return self._asking.submit(self._ask, shard, group)

    def close(self) -> None:
        """End the process; groups that were asked for and have not come will not."""
        self._asking.shutdown(wait=False, cancel_futures=True)
        with self._replacing:
            self._closed = True
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START, json.dumps(sys.path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send(process, self._source)
        return process

    def _ask(self, shard: int, group: int) -> Group:
        while True:
            try:
                self._send(self._process, (shard, group))
                assert self._process.stdout is not None
                answer: Any = pickle.load(self._process.stdout)
                break
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                self._replace(error)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _replace(self, error: Exception) -> None:
        """Start the process again after it has died of something else than `close`."""
        with self._replacing:
            if self._closed:
                raise CancelledError from error
            code, self._deaths = self._process.wait(), self._deaths + 1
            if self._deaths > DEATHS:
                died = f"died {self._deaths} times, at last with exit code {code}"
                raise ResumableError(f"the process that decodes labels {died}") from error
            self._process = self._start()

    @staticmethod
    def _send(process: subprocess.Popen[bytes], what: object) -> None:
        assert process.stdin is not None
        pickle.dump(what, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()


def serve() -> None:
    """Run the decoder process: answer requests from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to the whole group; the trainer decides when this ends
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not get between the answers
    try:
        _answer(requests, answers)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the trainer is gone


def _answer(requests: BinaryIO, answers: BinaryIO) -> None:
    source: GroupSource = pickle.load(requests)
    reader = GroupReader(source)
    while True:
        shard, group = pickle.load(requests)
        try:
            found: Group | Exception = reader.read(shard, group)
        except Exception as error:
            found = error
        pickle.dump(found, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
