"""Claims on the shards of a label log, by which several runs that need the same labels share the work.

    labels/<key>/writers/<writer>.json   a heartbeat: rewritten every few seconds while this run labels
                 claims/<name>.json      put-if-absent: the writer, and the process of it, that is about to commit `name`

A claim counts while there is a heartbeat of its writer. Every writer watches the heartbeats of the others, each by its own
clock, and removes one that has not changed for `STALE_S`; then the claims of that writer are free. So clocks of two machines
are never compared. A claim saves work and protects nothing: a writer that comes back from a long sleep may label a shard
that another has taken over, and of two that take over the same claim at once both may label. The log takes the first commit.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.errors import EnvironmentFault
from orchestrator.store.files import Store
from orchestrator.store.lock import holder_now

RENEW_S, STALE_S = 5.0, 20.0
CLAIMS, WRITERS = "claims", "writers"


@dataclass(frozen=True)
class Claims:
    """The claims of one writer in one log; small, so that remote workers can carry it."""

    store: Store
    folder: str
    """The log's folder."""
    writer: str
    """The name of this run: the same in every attempt, and no two live processes write under it."""

    def take(self, name: str, by: str) -> bool:
        """Claim `name` for the process `by` of this writer; False if another process has it and its writer lives.

        A process that takes what it has already taken still has it.
        """
        key, claim = f"{self.folder}/{CLAIMS}/{name}.json", json.dumps({"writer": self.writer, "by": by}).encode()
        if self.store.put_if_absent(key, claim):
            return True
        standing = self._writer_of(key)
        if standing is not None and self._lives(standing):
            return False
        self.store.remove(key)
        return self.store.put_if_absent(key, claim)

    def is_free(self, name: str) -> bool:
        """Return whether no other live writer has claimed `name`."""
        writer = self._writer_of(f"{self.folder}/{CLAIMS}/{name}.json")
        return writer is None or writer == self.writer or not self._lives(writer)

    def release(self, name: str) -> None:
        """Give up the claim on `name`."""
        self.store.remove(f"{self.folder}/{CLAIMS}/{name}.json")

    @contextmanager
    def kept_alive(self) -> Generator[None]:
        """Let the claims of this writer count, and end those of writers that have died, until the block ends.

        Claims that an earlier attempt left behind are given up at the beginning, and all others at the end.
        """
        self._release_all()
        watch = _Watch(self)
        watch.look()
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(RENEW_S):
                with suppress(EnvironmentFault):  # the next round, or the labelling itself, will tell
                    watch.look()

        thread = threading.Thread(target=keep, name="claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with suppress(EnvironmentFault):  # then they end when this writer is found dead
                self.store.remove(self.heartbeat(self.writer))
                self._release_all()

    def heartbeat(self, writer: str) -> str:
        """Return the key of the heartbeat of `writer`."""
        return f"{self.folder}/{WRITERS}/{writer}.json"

    def writers(self) -> list[str]:
        """Return the writers that have a heartbeat."""
        return [name.removesuffix(".json") for name in self.store.keys(f"{self.folder}/{WRITERS}")]

    def _lives(self, writer: str) -> bool:
        return self.store.exists(self.heartbeat(writer))

    def _writer_of(self, key: str) -> str | None:
        claim = cast("dict[str, Any] | None", self.store.read_json(key))
        return None if claim is None else str(claim["writer"])

    def _release_all(self) -> None:
        for name in self.store.keys(f"{self.folder}/{CLAIMS}"):
            key = f"{self.folder}/{CLAIMS}/{name}"
            if self._writer_of(key) == self.writer:
                self.store.remove(key)


class _Watch:
    """The heartbeats of a log: one is kept going, the others are looked at."""

    def __init__(self, claims: Claims) -> None:
        self._claims, self._holder, self._beats = claims, holder_now(), 0
        self._seen: dict[str, tuple[bytes, float]] = {}
        """The content of each other heartbeat, and since when, by this process's clock, it has been that."""

    def look(self) -> None:
        """Renew the own heartbeat, and remove those of others that have stood still for too long."""
        store, own = self._claims.store, self._claims.writer
        self._beats += 1
        store.replace(self._claims.heartbeat(own), json.dumps({"holder": self._holder, "beats": self._beats}).encode())
        for writer in self._claims.writers():
            if writer != own and self._stands_still(writer):
                store.remove(self._claims.heartbeat(writer))

    def _stands_still(self, writer: str) -> bool:
        try:
            beat = self._claims.store.read(self._claims.heartbeat(writer))
        except FileNotFoundError:
            return False
        now = time.monotonic()
        before, since = self._seen.get(writer, (b"", now))
        self._seen[writer] = (beat, since if beat == before else now)
        return now - self._seen[writer][1] > STALE_S
