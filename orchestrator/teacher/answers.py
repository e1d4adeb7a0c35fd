"""The teacher's answers on the held-out rows that models are measured on, and what is kept beside them.

They are labels like any other, but for evaluation alone: exact ones, so that any student can be compared with the teacher on
these rows without starting one. What fails in making them is said and left out, since training needs none of it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from orchestrator.labels.answer import Answer
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Columns, Frame, pack
from orchestrator.labels.targets import TARGET_LOG_PROBS
from orchestrator.models.continuations import chosen_prompts, continuations
from orchestrator.models.speculate import measured_drafts
from orchestrator.models.speed import tokens_per_s
from orchestrator.store.files import Store, local_folder
from orchestrator.store.heldout import CONTINUATIONS, DRAFTS, SPEED, measured_rows
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import TokenManifest
from orchestrator.store.shards import TokenShard
from orchestrator.teacher.backend import Replica, Teacher, TransformersBackend
from orchestrator.teacher.task import Answering
from orchestrator.teacher.vllm import VllmBackend


class AnswerWriter:
    """Writes the answers of one teacher actor."""

    def __init__(self, asked: Answering, store: Store, data_folder: str, manifest: TokenManifest, vocab_size: int) -> None:
        self.log: LabelLog = asked.log.open(store)
        self.codec = Codec(asked.log.labels, Frame(vocab_size, manifest.seq_len))
        self._asked = asked
        self._rows = measured_rows(store, data_folder, manifest, asked.log.rows, asked.log.watched)
        self._parts = asked.log.shards(manifest)
        self._store, self._tokenizer = store, f"{data_folder}/tokenizer"

    def tokens(self, shard: int) -> TokenShard:
        """The rows of a shard of the log."""
        part = self._parts[shard]
        return self._rows.rows(slice(part.start, part.stop))

    def told_besides(self, teacher: Teacher, tokens: TokenShard) -> Columns:
        """Columns of what a server tells that answers with its most likely ids alone: how likely the targets are to it."""
        if not isinstance(teacher, VllmBackend):
            return {}
        log_probs = teacher.target_log_probs(torch.from_numpy(tokens.ids).long())
        return {TARGET_LOG_PROBS: pack(log_probs.numpy(), "<f4")}

    def keep_speed(self, teacher: Teacher, threads: int) -> None:
        """Measure and keep how fast `teacher` answers, and under which conditions."""
        ids = torch.from_numpy(self._rows.ids[: self._asked.speed_rows, :-1]).long()
        answers = _without_spreading(teacher) if isinstance(teacher, VllmBackend) else teacher.answer
        self._keep(SPEED, {"tokens_per_s": tokens_per_s(answers, ids), "rows": len(ids), "threads": threads})

    def keep_continuations(self, teacher: TransformersBackend, replica: Replica, micro_batch: int) -> None:
        """Have `teacher` continue prompts out of the rows; keep what it says, and how far its drafts hold, if it makes any."""
        tokenizer = self._store.local(self._tokenizer)
        windows, kept = torch.from_numpy(self._rows.ids).long(), torch.from_numpy(self._rows.counted())
        drafts = measured_drafts(teacher.model, local_folder(replica.model), windows, micro_batch)
        if drafts:
            self._keep(DRAFTS, drafts)
        self._keep(CONTINUATIONS, continuations(teacher.model, chosen_prompts(windows, kept), tokenizer))

    def _keep(self, name: str, value: Any) -> None:
        self.log.keep(name, json.dumps(value).encode())


def _without_spreading(server: VllmBackend) -> Any:
    """The answers of `server` without the logits that are made of them here."""

    def answers(ids: torch.Tensor) -> Answer:
        return replace(server.answer(ids), head=lambda states: states)

    return answers
