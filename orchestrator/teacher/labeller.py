"""The teacher actor: token shards in, committed label shards out, a small receipt through Ray."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass
from typing import Any

import ray
import torch

from orchestrator.errors import DataError, DistillError, ResumableError
from orchestrator.labels.basis import bases_of
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Arrays, Columns, Frame, join
from orchestrator.runtime.board import STUDENT_SHARDS
from orchestrator.runtime.environment import limit_threads
from orchestrator.spec.labels import Labels
from orchestrator.spec.model import VllmServer
from orchestrator.store.files import Store
from orchestrator.store.heldout import HeldoutLog, watched_rows
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import MANIFEST, ShardRecord, TokenManifest
from orchestrator.store.shards import TokenShard, read_tokens
from orchestrator.teacher.backend import Replica
from orchestrator.teacher.make import make_teacher
from orchestrator.teacher.placement import leave_placement

WAIT_S = 0.2


@dataclass(frozen=True)
class Labelling:
    """Everything a teacher actor needs to know, the same for all of them; small, because Ray keeps it for restarts."""

    store: Store
    data_folder: str
    replica: Replica
    vocab_size: int
    labels: Labels
    log_key: str
    micro_batch: int
    board: Any
    vllm: VllmServer | None = None
    """Answers instead."""
    heldout: HeldoutLog | None = None
    """To be labelled before all shards."""


@dataclass(frozen=True)
class _Book:
    """A log, and how what it keeps is made."""

    log: LabelLog
    codec: Codec


class Labeller:
    """Actor of the teacher pool. One call labels and commits the shards of one batch, in order."""

    def __init__(self, labelling: Labelling) -> None:
        limit_threads(labelling.replica.threads)
        torch.set_num_threads(labelling.replica.threads)
        self._work = labelling
        manifest = TokenManifest.load(labelling.store, f"{labelling.data_folder}/{MANIFEST}")
        assert manifest is not None
        self._manifest = manifest
        self._refusal: DistillError | None = None
        try:
            self._start()
        except DistillError as error:
            self._refusal = error  # Ray keeps but the text of what a constructor raises; the first call can raise it whole
        self._idle_since = time.perf_counter()
        # A process that is told to end, by an eviction say, comes back in its room; one that Ray Data lets go of leaves it.
        weakref.finalize(self, leave_placement).atexit = False

    def _start(self) -> None:
        work = self._work
        log, shape = LabelLog(work.store, work.log_key), (work.vocab_size, self._manifest.seq_len)
        self._train = _Book(log, Codec(work.labels, Frame(*shape, bases=bases_of(log))))
        self._heldout = work.heldout and _Book(
            LabelLog(work.store, work.heldout.key), Codec(work.heldout.labels, Frame(*shape))
        )
        self._teacher = make_teacher(work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._refusal is not None:
            raise self._refusal
        rows = zip(batch["heldout"], batch["shard"], batch["position"], strict=True)
        receipts = [self.label_heldout() if heldout else self.label(int(s), int(p)) for heldout, s, p in rows]
        return {name: [r[name] for r in receipts] for name in receipts[0]}

    def label(self, shard: int, position: int) -> dict[str, Any]:
        """Label and commit token shard `shard`, the `position`-th of the demand; returns its receipt."""
        began_s, idle_s = time.time(), time.perf_counter() - self._idle_since
        blocked_s = self._wait_for_student(position)
        started = time.perf_counter()
        record = self._manifest.train.record(self._work.store, shard)
        tokens = read_tokens(self._work.store, f"{self._work.data_folder}/train", record)
        committed = self._train.log.commit(shard, tokens, self.encode(self._train, shard, tokens))
        return self._receipt(committed, began_s, started, idle_s, blocked_s)

    def label_heldout(self) -> dict[str, Any]:
        """Label and commit the held-out rows that training is evaluated on; returns a receipt."""
        began_s, idle_s, started = time.time(), time.perf_counter() - self._idle_since, time.perf_counter()
        work = self._work
        assert work.heldout and self._heldout
        tokens = watched_rows(work.store, work.data_folder, self._manifest, work.heldout.rows)
        committed = self._heldout.log.commit(0, tokens, self.encode(self._heldout, 0, tokens))
        return self._receipt(committed, began_s, started, idle_s, 0.0) | {"heldout": True}

    def _receipt(
        self, committed: ShardRecord, began_s: float, started: float, idle_s: float, blocked_s: float
    ) -> dict[str, Any]:
        self._idle_since = time.perf_counter()
        return {
            "heldout": False,
            "rows": committed.rows,
            "bytes": committed.bytes,
            "seconds": self._idle_since - started,
            "blocked_s": blocked_s,
            "idle_s": idle_s,
            "began_s": began_s,
            "replica": ray.get_runtime_context().get_actor_id(),
            "process": os.getpid(),
        }

    def encode(self, book: _Book, shard: int, tokens: TokenShard) -> list[Columns]:
        """The label columns of each row group of a shard; raises `DataError` for a teacher that answers nonsense."""
        parts, groups, group_rows = list[Arrays](), list[Columns](), self._manifest.group_rows
        ids = torch.from_numpy(tokens.ids[:, :-1]).long()
        if int(ids.max()) >= self._work.vocab_size:
            raise DataError(
                f"token shard {shard} holds id {int(ids.max())}, the teacher's vocabulary {self._work.vocab_size} ids"
            )
        for start in range(0, len(ids), self._work.micro_batch):
            part = ids[start : start + self._work.micro_batch]
            answer = self._teacher.answer(part)
            if (*answer.states.shape[:2], answer.vocab_size) != (*part.shape, self._work.vocab_size):
                given, due = (*answer.states.shape[:2], answer.vocab_size), (*part.shape, self._work.vocab_size)
                raise DataError(f"label shard {shard}: the teacher answered {given} where {due} is due")
            seeds = [book.log.key.encode() + row for row in tokens.row_ids[start : start + len(part)]]
            try:
                parts.append(book.codec.extract(answer, seeds))
            except DataError as error:
                raise DataError(f"label shard {shard}, rows from {start}: {error}") from error
            done = start + len(part)
            if done % group_rows == 0 or done == len(ids):
                groups += book.codec.pack_groups(join(parts), group_rows)
                parts.clear()
        return groups

    def _wait_for_student(self, position: int) -> float:
        """Seconds spent until the student is close enough behind; raises `ResumableError` if it will never come."""
        ahead = self._work.labels.run_ahead
        if ahead is None:
            return 0.0
        started = time.perf_counter()
        board = self._work.board
        while True:
            progress: dict[str, float] = ray.get(board.progress.remote())
            if position < progress.get(f"student.{STUDENT_SHARDS}", 0) + ahead:
                return time.perf_counter() - started
            reason = ray.get(board.aborted.remote())
            if reason:
                raise ResumableError(f"labelling stopped: {reason}")
            time.sleep(WAIT_S)
