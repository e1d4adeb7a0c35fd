"""Token shards in, committed label shards out: the part of a teacher's actor that knows nothing of pools."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch

from orchestrator.errors import DataError
from orchestrator.labels.basis import bases_of
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Arrays, Columns, Frame, join
from orchestrator.runtime.environment import limit_threads
from orchestrator.store.heldout import watched_rows
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import MANIFEST, ShardRecord, TokenManifest
from orchestrator.store.shards import TokenShard, read_tokens
from orchestrator.teacher.answers import AnswerWriter
from orchestrator.teacher.backend import Teacher, TransformersBackend
from orchestrator.teacher.make import make_teacher
from orchestrator.teacher.probe import check_probe
from orchestrator.teacher.task import Item, LabelTask


@dataclass(frozen=True)
class _Book:
    """A log, and the codec of what it keeps."""

    log: LabelLog
    codec: Codec


@dataclass(frozen=True)
class Asked:
    """A shard that the teacher has answered, and whose labels are not committed yet."""

    item: Item
    tokens: TokenShard
    groups: list[Future[list[Columns]]]
    """The columns of its row groups, which are packed while the teacher goes on."""
    besides: Columns
    """Columns beside those of the codec."""


class ShardWriter:
    """A teacher and the logs that it writes to."""

    def __init__(self, task: LabelTask) -> None:
        """Load the teacher of `task`; this process computes with as many threads as its replica has from now on."""
        limit_threads(task.replica.threads)
        torch.set_num_threads(task.replica.threads)
        manifest = TokenManifest.load(task.store, f"{task.data_folder}/{MANIFEST}")
        assert manifest is not None
        self._task, self._manifest, self._packer = task, manifest, ThreadPoolExecutor(1, "pack")
        log, shape = LabelLog(task.store, task.log_key), (task.vocab_size, manifest.seq_len)
        self._train = _Book(log, Codec(task.labels, Frame(*shape, bases=bases_of(log))))
        self._watched = task.heldout and _Book(
            LabelLog(task.store, task.heldout.key), Codec(task.heldout.labels, Frame(*shape))
        )
        self._teacher: Teacher = make_teacher(task)
        if task.vllm:
            prompts = torch.from_numpy(self._tokens(Item("shard")).ids)
            check_probe(log, self._teacher, prompts, f"{task.vllm.model} at {task.vllm.url}")

    def committed(self, item: Item) -> ShardRecord | None:
        """Return the commit record of `item`, None if there is none."""
        return self._book(item).log.committed(item.shard)

    def ask(self, item: Item) -> Asked:
        """Have the teacher answer all rows of `item`; raises `DataError` for one that answers nonsense."""
        tokens, besides = self._tokens(item), Columns()
        if item.kind == "measured":
            if item.shard == 0:
                self._measured.keep_speed(self._teacher, self._task.replica.threads)
            besides = self._measured.told_besides(self._teacher, tokens)
        return Asked(item, tokens, self._answers(self._book(item), item.shard, tokens), besides)

    def continue_prompts(self) -> None:
        """Have the teacher continue the prompts of the report, and keep what it says."""
        assert isinstance(self._teacher, TransformersBackend)
        self._measured.keep_continuations(self._teacher, self._task.replica, self._task.micro_batch)

    def commit(self, asked: Asked) -> ShardRecord:
        """Pack the labels of a shard, and commit them; another thread may ask the teacher meanwhile."""
        book = self._book(asked.item)
        groups = [columns for packed in asked.groups for columns in packed.result()]
        size = self._manifest.group_rows
        for number, columns in enumerate(groups):
            rows = slice(number * size, (number + 1) * size)
            columns |= {name: values[rows] for name, values in asked.besides.items()}
        return book.log.commit(asked.item.shard, asked.tokens, groups)

    @cached_property
    def _measured(self) -> AnswerWriter:
        task = self._task
        assert task.answering is not None
        return AnswerWriter(task.answering, task.store, task.data_folder, self._manifest, task.vocab_size)

    def _book(self, item: Item) -> _Book:
        match item.kind:
            case "watched":
                assert self._watched is not None
                return self._watched
            case "measured":
                return _Book(self._measured.log, self._measured.codec)
            case _:
                return self._train

    def _tokens(self, item: Item) -> TokenShard:
        store, folder = self._task.store, self._task.data_folder
        if item.kind == "watched":
            assert self._task.heldout is not None
            return watched_rows(store, folder, self._manifest, self._task.heldout.rows)
        if item.kind == "measured":
            return self._measured.tokens(item.shard)
        return read_tokens(store, f"{folder}/train", self._manifest.train.record(store, item.shard))

    def _answers(self, book: _Book, shard: int, tokens: TokenShard) -> list[Future[list[Columns]]]:
        """Return the columns of the row groups of the teacher's answers; they are packed in a thread of its own."""
        parts, groups, group_rows = list[Arrays](), list[Future[list[Columns]]](), self._manifest.group_rows
        ids, size, vocab = torch.from_numpy(tokens.ids[:, :-1]).long(), self._task.micro_batch, self._task.vocab_size
        if int(ids.max()) >= vocab:
            raise DataError(f"token shard {shard} holds id {int(ids.max())}, the teacher's vocabulary {vocab} ids")
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            answer = self._teacher.answer(part)
            given, due = (*answer.states.shape[:2], answer.vocab_size), (*part.shape, vocab)
            if given != due:
                raise DataError(f"label shard {shard}: the teacher answered {given} where {due} is due")
            seeds = [book.log.key.encode() + row for row in tokens.row_ids[start : start + len(part)]]
            try:
                parts.append(book.codec.extract(answer, seeds))
            except DataError as error:
                raise DataError(f"label shard {shard}, rows from {start}: {error}") from error
            done = start + len(part)
            if done % group_rows == 0 or done == len(ids):
                groups.append(self._packer.submit(book.codec.pack_groups, join(parts), group_rows))
                parts = []
        return groups
