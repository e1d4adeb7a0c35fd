"""The teacher actor: token shards in, committed label shards out, a small receipt of each through Ray.

Two calls run at a time, each in a thread: while the labels of one shard are packed, hashed and committed, the teacher answers
the next. A receipt leaves when its shard is committed.

Before a shard is labelled it is looked for in the log and claimed (store/claims.py). One that another run has claimed is
deferred: it is put on the board, and whichever actor of this run is next at leisure looks after it, until it is committed or
may be labelled here.

A process whose accelerator fails tells the board the cause and ends; Ray starts it anew and gives it its shard again. A
replica that ends so, or is killed, `SETBACKS` times without having labelled a shard in between ends the run.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from typing import Any, Literal

import ray

from orchestrator.errors import DistillError, ResumableError, one_line
from orchestrator.faults import Fault, diagnose
from orchestrator.runtime.board import STUDENT_SHARDS
from orchestrator.store.records import ShardRecord
from orchestrator.teacher.placement import leave_placement
from orchestrator.teacher.task import Item, LabelTask, Outcome
from orchestrator.teacher.writer import Asked, ShardWriter

WAIT_S, SETTLE_EVERY_S = 0.2, 1.0
SETBACKS = 3
FAULTY = 18
"""The exit code of a process whose accelerator has failed; any but 0 is a crash to Ray."""

Receipt = dict[str, Any]
"""The outcome of one item, and the time it took."""
Begun = ShardRecord | Asked | Literal["continued", "failed"] | None
"""State of an item when the teacher is done with it: committed, answered, or claimed elsewhere (None). Items that only the
report needs are continued or have failed."""


class Labeller:
    """Actor of the teacher pool. One call labels and commits the shards of one batch, in order; safe for several threads."""

    def __init__(self, task: LabelTask) -> None:
        self._task, self._board = task, task.board
        self._replica: str = ray.get_runtime_context().get_actor_id() or "no actor"
        self._refusal: Exception | None = None
        self._turn = threading.Lock()
        """Held by the call that has the teacher."""
        try:
            self._start()
        except Exception as error:
            self._end_if_faulty(error)
            self._refusal = error  # Ray keeps but the text of what a constructor raises; the first call can raise it whole
        self._idle_since, self._settled = time.perf_counter(), 0.0
        # A process that is told to end, by an eviction say, comes back in its room; one that Ray Data lets go of leaves it.
        weakref.finalize(self, leave_placement).atexit = False

    def _start(self) -> None:
        setbacks, cause = ray.get(self._board.replica_starts.remote(self._replica))
        if setbacks >= SETBACKS:
            cause = cause or "the process ended without telling a cause; it may have been killed, or short of memory"
            raise ResumableError(f"teacher: a replica failed {setbacks} times without labelling a shard in between: {cause}")
        self._shards = ShardWriter(self._task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._refusal is not None:
            raise self._refusal
        rows = zip(batch["kind"], batch["shard"], batch["position"], strict=True)
        try:
            receipts = [receipt for k, s, p in rows for receipt in self.label(Item(str(k), int(s), int(p)))]  # type: ignore[arg-type]
        except Exception as error:
            self._end_if_faulty(error)
            raise
        return {name: [r[name] for r in receipts] for name in receipts[0]}

    def label(self, item: Item) -> list[Receipt]:
        """Label and commit `item`, unless it is committed or claimed elsewhere.

        Returns its receipt, after those of deferred items that were settled on the way. Raises `ResumableError` if the
        student that the labels must not run ahead of will never come.
        """
        # The student is waited for out of turn: the other call may have the very shard that the student waits for.
        waited_s, receipts = self._wait_for_student(item.position) if item.kind == "shard" else (0.0, [])
        receipts += self._settle_deferred(0.0)
        with self._turn:
            watch = _StopWatch(self._idle_since, waited_s)
            begun = self._continued(watch) if item.kind == "continuations" else self._begin(item, watch)
        if begun is None:
            self._board.defer.remote(tuple(item))
        return [*receipts, self._settled_receipt(item, begun, watch)]

    def _settled_receipt(self, item: Item, begun: Begun, watch: _StopWatch) -> Receipt:
        """Commit `item` if the teacher has answered it; returns its receipt."""
        match begun:
            case Asked():
                return self._finish(begun, watch)
            case "continued":
                return self._receipt(item, "labelled", None, watch)
            case "failed":
                return self._receipt(item, "failed", None, watch)
            case None:
                return self._receipt(item, "deferred", None, watch)
            case record:
                return self._receipt(item, "found", record, watch)

    def _continued(self, watch: _StopWatch) -> Literal["continued"]:
        """Have the teacher continue the prompts of the report; training needs none of it, so a failure is only said."""
        watch.begin()
        try:
            self._shards.continue_prompts()
        except Exception as error:
            self._warn(f"labels: the teacher could not continue the report's prompts: {type(error).__name__}: {error}")
        watch.end()
        self._idle_since = time.perf_counter()
        return "continued"

    def _warn(self, text: str) -> None:
        ray.get(self._board.warn.remote(text))

    def _settle_deferred(self, waited_s: float) -> list[Receipt]:
        """Label what was deferred and may be labelled now; returns receipts of that, and of what others have committed.

        The student has been waited for since `waited_s` ago.
        """
        receipts: list[Receipt] = []
        with self._turn:
            if time.monotonic() - self._settled < SETTLE_EVERY_S:
                return receipts
            for item in itertools.starmap(Item, ray.get(self._board.deferred.remote())):
                watch = _StopWatch(self._idle_since, waited_s)
                begun = self._begin(item, watch)
                if begun is None:
                    continue
                receipt = self._settled_receipt(item, begun, watch)
                if ray.get(self._board.settle.remote(tuple(item))):
                    receipts.append(receipt)
            self._settled = time.monotonic()
        return receipts

    def _begin(self, item: Item, watch: _StopWatch) -> Begun:
        """Claim `item` and ask the teacher about it.

        Returns its commit record instead if it has one, and None if it is claimed elsewhere. Answers that only the report needs
        may fail, which is said.
        """
        watch.begin()
        try:
            found, claims = self._shards.committed(item), self._task.claims
            if found is not None or not claims.take(item.claim, by=self._replica):
                return found
            found = self._shards.committed(item)  # since the first look somebody may have committed it
            if found is not None:
                claims.release(item.claim)
                return found
            return self._shards.ask(item)
        except DistillError as error:
            if not item.optional:
                raise
            self._task.claims.release(item.claim)
            self._warn(f"labels: the teacher's answers on held-out rows were not kept, so figures will be missing: {error}")
            return "failed"
        finally:
            watch.end()
            self._idle_since = time.perf_counter()

    def _finish(self, asked: Asked, watch: _StopWatch) -> Receipt:
        """Commit the labels of a shard that the teacher has answered; returns its receipt."""
        record = self._shards.commit(asked)
        self._board.replica_labelled.remote(self._replica)
        self._task.claims.release(asked.item.claim)
        return self._receipt(asked.item, "labelled", record, watch)

    def _receipt(self, item: Item, outcome: Outcome, record: ShardRecord | None, watch: _StopWatch) -> Receipt:
        return watch.figures() | {
            "heldout": item.kind != "shard",
            "outcome": outcome,
            "rows": record.rows if record else 0,
            "bytes": record.bytes if record else 0,
            "replica": self._replica,
            "process": os.getpid(),
        }

    def _wait_for_student(self, position: int) -> tuple[float, list[Receipt]]:
        """Wait until the student is close enough behind, and settle deferred items meanwhile.

        Returns the seconds of waiting, and the receipts of those items.
        """
        ahead, receipts = self._task.labels.run_ahead, list[Receipt]()
        if ahead is None:
            return 0.0, receipts
        started = time.perf_counter()
        while True:
            progress: dict[str, float] = ray.get(self._board.progress.remote())
            if position < progress.get(f"student.{STUDENT_SHARDS}", 0) + ahead:
                return time.perf_counter() - started, receipts
            reason = ray.get(self._board.aborted.remote())
            if reason:
                raise ResumableError(f"labelling stopped: {reason}")
            time.sleep(WAIT_S)
            receipts += self._settle_deferred(time.perf_counter() - started)

    def _end_if_faulty(self, error: Exception) -> None:
        """End this process if `error` is a fault of its accelerator, which no later call would be spared."""
        fault, cause = diagnose(error)
        if fault is Fault.ACCELERATOR:
            text = one_line(f"{type(cause).__name__}: {cause}")
            ray.get(self._board.replica_failed.remote(self._replica, text))
            ray.get(self._board.warn.remote(f"labels: a teacher replica is started anew: {text}"))
            os._exit(FAULTY)


class _StopWatch:
    """The times of one item."""

    def __init__(self, idle_since: float, waited_s: float) -> None:
        """Start when the teacher is free for the item, for which the student has been waited for `waited_s`.

        `idle_since` is when, by the performance counter, the teacher was done with its last item.
        """
        free_s = time.perf_counter() - idle_since
        self._blocked_s = min(free_s, waited_s)
        self._idle_s, self._began_s = free_s - self._blocked_s, time.time() - self._blocked_s
        self._begin = self._end = 0.0

    def begin(self) -> None:
        """Note that the teacher begins with the item."""
        self._begin = time.perf_counter()

    def end(self) -> None:
        """Note that the teacher has done its part."""
        self._end = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Return when the item was taken up, and seconds: idle and blocked before it, busy with it, and in all."""
        return {
            "began_s": self._began_s,
            "idle_s": self._idle_s,
            "blocked_s": self._blocked_s,
            "seconds": self._end - self._begin,
            "took_s": time.perf_counter() - self._begin,
        }
