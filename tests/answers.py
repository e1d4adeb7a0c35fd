"""Held-out windows as a run has them, and the log in which a teacher has answered them, without a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from orchestrator.evaluate.model import AnsweringTeacher, Result, Subject, measure_model, measure_teacher
from orchestrator.evaluate.windows import Heldout
from orchestrator.labels.layout import join
from orchestrator.spec.labels import HiddenLabels, TopkLabels
from orchestrator.store.heldout import ANSWERS, AnswerLog
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import paged
from orchestrator.store.shards import TokenShard, put_tokens
from orchestrator.teacher.answers import Answering, AnswerWriter
from orchestrator.teacher.backend import Replica, Teacher, TransformersBackend

CPU = torch.device("cpu")
EXACT = HiddenLabels(kind="hidden", codec="fp32")
FOLDER = "data/windows"


def answer_log(store: LocalStore, rows: int, labels: HiddenLabels | TopkLabels = EXACT) -> AnswerLog:
    """A log with nothing in it."""
    key = LabelLog.open(store, {"labels": labels.model_dump(mode="json"), "rows": rows}, ANSWERS).key
    return AnswerLog(key, labels, rows, watched=0)


def heldout_of(
    store: LocalStore, ids: torch.Tensor, kept: torch.Tensor | None, tokenizer: Path, labels: HiddenLabels | TopkLabels = EXACT
) -> Heldout:
    """`ids` [rows, seq + 1] as the held-out windows of a corpus whose targets `kept` [rows, seq] count; two of a document."""
    mask = None if kept is None else kept.numpy()
    names = [bytes([row // 2]) * 16 for row in range(len(ids))]
    shard = TokenShard([bytes([row]) * 16 for row in range(len(ids))], ids.numpy().astype(np.int32), mask, names)
    record = put_tokens(store, f"{FOLDER}/heldout", 0, shard, group_rows=len(ids))
    manifest = TokenManifest.without_corpus(ids.shape[1] - 1, 0, group_rows=len(ids))
    manifest = manifest.model_copy(update={"heldout": paged(store, f"{FOLDER}/heldout", [record])})
    shutil.copytree(tokenizer, store.path(f"{FOLDER}/tokenizer"), dirs_exist_ok=True)
    return Heldout(store, FOLDER, manifest, answer_log(store, len(ids), labels))


def answer(heldout: Heldout, teacher: Teacher, vocab_size: int, replica: Replica | None = None, micro_batch: int = 3) -> None:
    """Have `teacher` do what the teacher pool does with held-out windows; continuations too if `replica` is given."""
    shards = tuple(range(len(heldout.log.shards(heldout.manifest))))
    asked = Answering(heldout.log, shards, speed_rows=2, continues=replica is not None)
    writer = AnswerWriter(asked, heldout.store, heldout.data_folder, heldout.manifest, vocab_size)
    for shard in shards:
        tokens = writer.tokens(shard)
        ids = torch.from_numpy(tokens.ids[:, :-1]).long()
        kept = [writer.codec.extract(teacher.answer(part), []) for part in ids.split(micro_batch)]
        (columns,) = writer.codec.pack_groups(join(kept), len(ids))
        writer.log.commit(shard, tokens, [columns | writer.told_besides(teacher, tokens)])
    writer.keep_speed(teacher, threads=1)
    if replica:
        assert isinstance(teacher, TransformersBackend)
        writer.keep_continuations(teacher, replica, micro_batch)


class Here:
    """What measures models in a run, in this process."""

    def __init__(self, micro_batch: int) -> None:
        self._micro_batch = micro_batch

    def teacher(self, heldout: Heldout, teacher: AnsweringTeacher) -> Result:
        return measure_teacher(heldout, teacher, self._micro_batch, CPU)

    def model(self, name: str, subject: Subject, heldout: Heldout, teacher: AnsweringTeacher | None) -> Result:
        return measure_model(name, subject, heldout, teacher, self._micro_batch, CPU)

    def end(self) -> None:
        pass


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
