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
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import MANIFEST, TokenManifest
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


class Labeller:
    """Actor of the teacher pool. One call labels and commits the shards of one batch, in order."""

    def __init__(self, labelling: Labelling) -> None:
        limit_threads(labelling.replica.threads)
        torch.set_num_threads(labelling.replica.threads)
        self._work = labelling
        manifest = TokenManifest.load(labelling.store, f"{labelling.data_folder}/{MANIFEST}")
        assert manifest is not None
        self._manifest = manifest
        self._log = LabelLog(labelling.store, labelling.log_key)
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
        frame = Frame(work.vocab_size, self._manifest.seq_len, bases=bases_of(self._log))
        self._codec = Codec(work.labels, frame)
        self._teacher = make_teacher(work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._refusal is not None:
            raise self._refusal
        receipts = [self.label(int(s), int(p)) for s, p in zip(batch["shard"], batch["position"], strict=True)]
        return {name: [r[name] for r in receipts] for name in receipts[0]}

    def label(self, shard: int, position: int) -> dict[str, Any]:
        """Label and commit token shard `shard`, the `position`-th of the demand; returns its receipt."""
        began_s, idle_s = time.time(), time.perf_counter() - self._idle_since
        blocked_s = self._wait_for_student(position)
        started = time.perf_counter()
        record = self._manifest.train[shard]
        tokens = read_tokens(self._work.store, f"{self._work.data_folder}/train", record)
        committed = self._log.commit(shard, tokens, self.encode(shard, tokens))
        self._idle_since = time.perf_counter()
        return {
            "shard": shard,
            "rows": committed.rows,
            "bytes": committed.bytes,
            "seconds": self._idle_since - started,
            "blocked_s": blocked_s,
            "idle_s": idle_s,
            "began_s": began_s,
            "replica": ray.get_runtime_context().get_actor_id(),
            "process": os.getpid(),
        }

    def encode(self, shard: int, tokens: TokenShard) -> Columns:
        """The label columns of a whole shard; raises `DataError` for a teacher that answers nonsense."""
        parts: list[Arrays] = []
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
            seeds = [self._work.log_key.encode() + row for row in tokens.row_ids[start : start + len(part)]]
            try:
                parts.append(self._codec.extract(answer, seeds))
            except DataError as error:
                raise DataError(f"label shard {shard}, rows from {start}: {error}") from error
        return self._codec.pack(join(parts))

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
