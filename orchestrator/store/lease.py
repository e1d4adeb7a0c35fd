"""One writer at a time in a bucket: a lock that its holder has to keep renewing.

The lock is an object that names its holder and says how often it has been renewed. Every change of it is conditional on its
ETag, so that of two processes one fails. Whoever wants it and finds it held watches it: a renewal shows that the holder
lives; none for `STALE_S` that it does not, and the lock is taken over. A holder that comes back from a long sleep finds
that its next renewal is refused. Times are those of the bucket or of the watcher; clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress

from orchestrator.errors import EnvironmentFault, LockedError
from orchestrator.store.bucket import Bucket, Tagged
from orchestrator.store.interface import Lock
from orchestrator.store.lock import holder_now

RENEW_S, STALE_S, LOOK_S = 5.0, 20.0, 0.5
CLOCK_TICK_S = 1.0
"""Resolution of S3's modification times, in seconds."""


@contextmanager
def lease(bucket: Bucket, name: str) -> Generator[Lock]:
    """Hold the lock object `name`; raises `LockedError`, naming the holder, if another process has it.

    Takes until the holder's next renewal to say so, and `STALE_S` to take over from one that is dead.
    """
    held = _Lease(bucket, name)
    held.take()
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_S):
            with suppress(EnvironmentFault):  # the next renewal, or the holder's own question, will tell
                held.renew()

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield Lock(held.id, held.still_ours)
    finally:
        stop.set()
        thread.join()
        held.release()


def held(bucket: Bucket, name: str) -> bool:
    """Return whether the lock object `name` has been renewed in the last `STALE_S` seconds; it is not modified."""
    looking = _Lease(bucket, name)
    standing = looking.standing()
    return standing is not None and not _is_free(standing) and looking.age_s(standing) < STALE_S


def check(bucket: Bucket, name: str, token: str) -> None:
    """Raise `LockedError`, naming the holder, unless the lock object `name` is held under `token`."""
    looking = _Lease(bucket, name)
    standing = looking.standing()
    if standing is None or json.loads(standing.data).get("id") != token:
        raise looking.locked_by(standing)


class _Lease:
    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._holder, self.id, self._renewals = holder_now(), uuid.uuid4().hex, 0
        self._mutex = threading.Lock()
        self._tag: str | None = None
        self._renewed = 0.0

    def take(self) -> None:
        first = standing = self.standing()
        since = time.monotonic() - (0.0 if standing is None else self.age_s(standing))
        while standing is not None and not _is_free(standing) and time.monotonic() - since < STALE_S:
            time.sleep(LOOK_S)
            standing = self.standing()
            if standing is not None and first is not None and standing.tag != first.tag and not _is_free(standing):
                raise self.locked_by(standing)
        self._renewed = time.monotonic()
        self._tag = self._bucket.write_if(self._name, self._body(), None if standing is None else standing.tag)
        if self._tag is None:  # another was faster
            raise self.locked_by(self.standing())

    def renew(self) -> None:
        with self._mutex:
            if self._tag is None:
                return
            began, self._renewals = time.monotonic(), self._renewals + 1
            tag = self._bucket.write_if(self._name, self._body(), self._tag)
            standing = self.standing() if tag is None else None
            if standing is not None and self.id in standing.data.decode():
                tag = standing.tag  # an earlier renewal of ours has arrived, and nobody was told
            self._tag, self._renewed = tag, began

    def still_ours(self) -> None:
        if time.monotonic() - self._renewed > STALE_S:
            self.renew()
        if self._tag is None:
            raise self.locked_by(self.standing())

    def release(self) -> None:
        with self._mutex, suppress(EnvironmentFault):  # then it becomes stale
            if self._tag is not None:
                self._bucket.write_if(self._name, b"{}", self._tag)

    def age_s(self, standing: Tagged) -> float:
        """At least so long ago, by the bucket's clock, `standing` was written."""
        probe = f"{self._name}.{self.id}"
        self._bucket.write(probe, b"")
        now = self._bucket.read_tagged(probe).modified
        self._bucket.remove([probe])
        return max(0.0, (now - standing.modified).total_seconds() - CLOCK_TICK_S)

    def standing(self) -> Tagged | None:
        try:
            return self._bucket.read_tagged(self._name)
        except FileNotFoundError:
            return None

    def _body(self) -> bytes:
        return json.dumps({"holder": self._holder, "id": self.id, "renewals": self._renewals}).encode()

    def locked_by(self, standing: Tagged | None) -> LockedError:
        holder = "another process" if standing is None or _is_free(standing) else json.loads(standing.data)["holder"]
        return LockedError(f"{self._bucket.address(self._name.rpartition('/')[0])} is locked by {holder}")


def _is_free(standing: Tagged) -> bool:
    return standing.data == b"{}"
