"""One teacher replica on several processes, the shards of its model.

The first shard leads: it is the pool's actor, holds the labelling code and starts the others, which end with it. For every pass
it tells them what to run and runs it too; the model's own collectives do the rest. Beside whatever they compute, the leader and
every other shard keep in touch over a socket. A gang is lost as a whole: the leader ends itself when it misses another shard,
Ray starts it again in its place, it starts new shards and is given its work again. A leader that stands still is ended by
the second shard. A process that keeps in touch, but whose call into the model does not come back, ends itself.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from orchestrator.faults import Fault, classify
from orchestrator.labels.answer import Answer
from orchestrator.runtime.environment import hide_gpus, limit_threads
from orchestrator.teacher.backend import Replica, TransformersBackend
from orchestrator.teacher.placement import in_bundle

BEAT_S = 1.0
START_S = 600.0
"""Seconds for all shards to be up; to start a process and to read weights take long on a busy machine."""
LOST = 17
"""The exit code of a process that has lost its gang; any but 0 is a crash to Ray."""
BLAME_S = 5.0
"""Seconds that a leader waits to hear why another shard failed."""


class Gang:
    """A teacher on the processes of this actor's placement group."""

    def __init__(self, replica: Replica) -> None:
        group, host = ray.util.get_current_placement_group(), ray.util.get_node_ip_address()
        door = socket.create_server((host, 0))
        door.settimeout(START_S)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_S))
        leader = ray.get_runtime_context().current_actor
        assert group is not None
        self._others: list[Any] = [
            TeacherShard.options(**in_bundle(group, shard, replica.cpus, replica.gpus)).remote(
                replica, shard, (host, door.getsockname()[1]), leader if shard == 1 else None
            )
            for shard in range(1, replica.shards)
        ]
        try:
            ray.get([other.__ray_ready__.remote() for other in self._others], timeout=START_S)
        except RayError:
            os._exit(LOST)
        self._calls = _Calls(replica.call_s)
        closing = threading.Event()  # set before the other shards are let go of
        weakref.finalize(self, closing.set)
        for _ in self._others:
            _watch(door.accept()[0], replica.patience_s, self._calls, partial(_leave, closing))
        self._backend = self._together("load", host, store.port, own=partial(_join, replica, 0, store))

    def answer(self, ids: torch.Tensor) -> Answer:
        answer = self._together("answer", ids, own=partial(self._backend.answer, ids))
        return replace(answer, head=self._logits)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self._together("logits", states.shape, own=partial(self._backend.head, states))

    def _together(self, method: str, *args: Any, own: Callable[[], Any]) -> Any:
        """Run `own` while the other shards run `method`; returns what `own` returns."""
        calls = [getattr(other, method).remote(*args) for other in self._others]
        try:
            with self._calls.one():
                return own()
        except Exception as error:
            raise _cause(error, calls) from None


@ray.remote
class TeacherShard:
    """The actor of every shard of a gang but the first."""

    def __init__(self, replica: Replica, shard: int, contact: tuple[str, int], leader: Any) -> None:
        limit_threads(replica.threads)
        torch.set_num_threads(replica.threads)
        self._replica, self._shard = replica, shard
        self._backend: TransformersBackend
        self._calls = _Calls(replica.call_s)
        _watch(socket.create_connection(contact, START_S), replica.patience_s, self._calls, partial(_follow, leader))

    def load(self, host: str, port: int) -> None:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=START_S))
        with self._calls.one():
            self._backend = _join(self._replica, self._shard, store)

    def answer(self, ids: torch.Tensor) -> None:
        with self._calls.one():
            self._backend.answer(ids)

    def logits(self, shape: torch.Size) -> None:
        with self._calls.one():
            self._backend.head(self._backend.empty(shape))


def _join(replica: Replica, shard: int, store: Store) -> TransformersBackend:
    if not replica.gpus:
        hide_gpus()  # transformers would put a share wherever there is one
    dist.init_process_group("nccl" if replica.gpus else "gloo", store=store, rank=shard, world_size=replica.shards)
    return TransformersBackend(replica)


class _Calls:
    """The calls of this process into its share of the model, which all shards of a gang make together."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._began: float | None = None

    @contextmanager
    def one(self) -> Iterator[None]:
        """Make one call: on an error leave the process group, so that no other process waits for this one.

        A GPU works behind the program; what it fails with is raised here, where the other shards' errors are looked at.
        """
        self._began = time.monotonic()
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except BaseException:
            if dist.is_initialized():
                dist.destroy_process_group()
            raise
        finally:
            self._began = None

    @property
    def hang(self) -> bool:
        """True if a call began too long ago and has not come back, as when a kernel waits for a peer that never comes."""
        began = self._began
        return began is not None and time.monotonic() - began > self._longest_s


def _watch(contact: socket.socket, patience_s: float, calls: _Calls, lost: Callable[[bool], Any]) -> None:
    """Exchange a byte a second with the other end of `contact` in the background.

    Calls `lost(False)` when that process is gone or a call of this one hangs, and `lost(True)` when that process has been
    silent for `patience_s`.
    """
    contact.settimeout(patience_s)

    def keep() -> None:
        silent = False
        try:
            while not calls.hang:
                contact.sendall(b".")
                if not contact.recv(64):
                    break
                time.sleep(BEAT_S)
        except TimeoutError:
            silent = True
        except OSError:
            pass
        lost(silent)

    threading.Thread(target=keep, name="contact", daemon=True).start()


def _leave(closing: threading.Event, silent: bool) -> None:
    """End this process as a crash would, so that Ray starts it again; unless it is letting its gang go."""
    if not closing.is_set():
        os._exit(LOST)


def _follow(leader: Any, silent: bool) -> None:
    """End with the leader; one that merely stands still is ended first."""
    if silent and leader is not None:
        ray.kill(leader, no_restart=False)
        time.sleep(BLAME_S)  # let it reach Ray
    os._exit(LOST)


def _cause(error: Exception, calls: list[Any]) -> BaseException:
    """Find the first cause in a gang of which this process saw `error`; ends this process if another is gone or hangs."""
    ended, hanging = ray.wait(calls, num_returns=len(calls), timeout=BLAME_S)
    raised = [other for call in ended if (other := _raised(call)) is not None]
    if hanging or any(isinstance(other, RayError) for other in raised):
        os._exit(LOST)
    cause = next((e for e in (error, *raised) if classify(e) is not Fault.BROKEN_LINK), None)
    if cause is None:
        os._exit(LOST)  # nothing but the link broke
    return cause


def _raised(call: Any) -> BaseException | None:
    """Return what `call` raised in its process, or Ray's own error if that process is gone; None if it raised nothing."""
    try:
        ray.get(call)
    except RayTaskError as error:
        return error.cause
    except RayError as error:
        return error
    return None
