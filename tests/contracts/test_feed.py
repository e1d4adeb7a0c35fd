"""The feed: what every step of every rank is given is what the log holds for the rows of that step, read once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.errors import IntegrityError, ResumableError
from orchestrator.labels.answer import Answer
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame
from orchestrator.labels.targets import Sparse
from orchestrator.spec.job import Job
from orchestrator.spec.labels import SampledLabels
from orchestrator.spec.objective import Objective
from orchestrator.spec.train import Train
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import paged
from orchestrator.store.shards import TokenShard, put_tokens
from orchestrator.student import feed
from orchestrator.student.decoder import Decoder
from orchestrator.student.feed import Feed
from orchestrator.student.job import Soft, TrainingJob
from tests.label_logs import flip

SEQ, VOCAB, GROUP = 8, 100, 4
SHARD_ROWS = [12, 16, 8, 10]
STEPS, BATCH = 9, 8
LABELS = SampledLabels(samples=7)


class Course:
    """Tokens and labels in a storage, and a job that trains on them."""

    def __init__(self, root: Path) -> None:
        self.store, rng = LocalStore(root), np.random.default_rng(0)
        self.tokens = [
            TokenShard(
                [rng.bytes(16) for _ in range(rows)],
                rng.integers(0, VOCAB, (rows, SEQ + 1), dtype=np.int32),
                rng.random((rows, SEQ)) < 0.7,
            )
            for rows in SHARD_ROWS
        ]
        folder = "data/x/train"
        records = [put_tokens(self.store, folder, i, tokens, GROUP) for i, tokens in enumerate(self.tokens)]
        manifest = TokenManifest.without_corpus(SEQ, VOCAB, paged(self.store, folder, records), 0.7, GROUP)
        self.codec, self.log = Codec(LABELS, Frame(VOCAB, SEQ)), LabelLog.open(self.store, {})
        model = Job(name="a").student.model  # type: ignore[union-attr]
        train = Train(steps=STEPS, global_batch=BATCH, micro_batch=2, warmup_steps=0)
        soft = Soft(self.log.key, LABELS, Objective(), "", "fp32")
        self.job = TrainingJob("student", model, VOCAB, train, 3, "data/x", manifest, soft)

    def commit(self, shard: int) -> None:
        tokens = self.tokens[shard]
        logits = torch.randn(len(tokens.row_ids), SEQ, VOCAB, generator=torch.Generator().manual_seed(shard)) * 3
        arrays = self.codec.extract(Answer.of_logits(logits), tokens.row_ids)
        self.log.commit(shard, tokens, self.codec.pack_groups(arrays, GROUP))

    def of_ranks(self, world: int) -> TrainingJob:
        return replace(self.job, train=self.job.train.model_copy(update={"workers": world}))

    def due(self, shard: int, row: int) -> tuple[torch.Tensor, Sparse, torch.Tensor]:
        """ids, targets and mask of a row, from the log as a whole."""
        tokens, record = self.tokens[shard], self.log.committed(shard)
        assert record is not None and tokens.loss_mask is not None
        group, place = divmod(row, GROUP)
        arrays = self.codec.unpack(self.log.read(shard, record, tokens)[group])
        one = {name: values[place : place + 1] for name, values in arrays.items()}
        targets = self.codec.targets(one, 1.0)
        assert isinstance(targets, Sparse)
        return torch.from_numpy(tokens.ids[row]), targets, torch.from_numpy(tokens.loss_mask[row])


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path)


def dense(targets: Sparse, row: int) -> torch.Tensor:
    return torch.zeros(SEQ, VOCAB).scatter_add_(1, targets.ids[row].long(), targets.probs[row])


@pytest.mark.parametrize(("world", "first"), [(1, 0), (2, 3), (4, 0)])
def test_each_step_has_the_rows_and_labels_of_the_order(course: Course, world: int, first: int) -> None:
    for shard in range(len(SHARD_ROWS)):
        course.commit(shard)
    job = course.of_ranks(world)
    for rank in range(world):
        steps = list(Feed(course.store, job, rank, lambda: None).steps(first))
        assert [step for step, _ in steps] == list(range(first, STEPS))
        for step, micro_batches in steps:
            rows = job.order.share(step, rank, world)
            assert [len(micro.ids) for micro in micro_batches] == [2] * (BATCH // world // 2)
            for (shard, row), (micro, place) in zip(rows, ((m, i) for m in micro_batches for i in (0, 1)), strict=True):
                ids, targets, mask = course.due(shard, row)
                assert micro.ids.dtype == torch.int32 and torch.equal(micro.ids[place], ids)
                assert isinstance(micro.soft, Sparse) and micro.soft.ids.dtype == torch.int32
                assert torch.equal(dense(micro.soft, place), dense(targets, 0))
                assert micro.mask and torch.equal(micro.mask.kept[place], mask)
                on = micro.on(torch.device("cpu"))
                assert on.ids.dtype == torch.int64 and isinstance(on.soft, Sparse) and on.soft.ids.dtype == torch.int64


def test_a_group_is_asked_for_once_a_window(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(len(SHARD_ROWS)):
        course.commit(shard)
    asked = Counter[tuple[int, int]]()
    read = Decoder.group

    def counted(self: Decoder, shard: int, group: int) -> Any:
        asked[shard, group] += 1
        return read(self, shard, group)

    monkeypatch.setattr(Decoder, "group", counted)
    job = replace(course.job, train=course.job.train.model_copy(update={"steps": 4}))
    list(Feed(course.store, job, 0, lambda: None).steps(0))
    used = {(row.shard, row.row // GROUP) for step in range(4) for row in job.order.batch(step)}
    assert set(asked) == used and sum(asked.values()) <= len(used) + 2, "each once, but those that lie across two windows"


def test_nobody_enters_a_step_before_all_of_it_is_labelled(course: Course) -> None:
    """Fault of kind: a rank whose own labels were there waited for the others inside a collective, until that timed out."""
    job = course.of_ranks(4)
    order, needed = job.order, job.order.shards_until(1)
    assert len(needed) == 1
    later = next(step for step in range(STEPS) if order.shard_count_until(step + 1) > 1)
    demand = order.shards_until(STEPS)
    (own,) = {row.shard for row in order.share(later, 0, 4)} - set(needed) or {needed[0]}
    withheld = next(shard for shard in demand[: order.shard_count_until(later + 1)] if shard not in (own, *needed))
    for shard in {*range(len(SHARD_ROWS))} - {withheld}:
        course.commit(shard)
    steps = Feed(course.store, job, 0, lambda: None).steps(0)
    for expected in range(later):
        assert next(steps)[0] == expected
    entered = threading.Event()
    waiting = threading.Thread(target=lambda: (next(steps), entered.set()), daemon=True)
    waiting.start()
    assert not entered.wait(1.0), "the rank needs none of the shard's rows, but another one does"
    course.commit(withheld)
    assert entered.wait(20)
    waiting.join()
    steps.close()


def test_who_waits_in_vain_is_told_why(course: Course) -> None:
    with pytest.raises(ResumableError, match=r"stopped waiting for label shard .*: the teacher died"):
        next(Feed(course.store, course.job, 0, lambda: "the teacher died").steps(0))


@pytest.mark.parametrize("part", ["labels", "tokens"])
def test_damage_is_told_by_shard_and_way_out(course: Course, part: str) -> None:
    for shard in range(len(SHARD_ROWS)):
        course.commit(shard)
        record = course.log.committed(shard)
        assert record is not None
        folder = f"{course.log.folder}/data"
        if part == "tokens":
            folder, record = "data/x/train", course.job.manifest.train.record(course.store, shard)
        for group in (course.log.file(shard, record) if part == "labels" else _token_file(course, record)).footer.groups:
            flip(course.store.path(f"{folder}/{record.file}"), 8 * (group.start + group.bytes // 2))
    way_out = "label shard .*distill labels repair" if part == "labels" else "token shard .*remove .*data/x and run"
    with pytest.raises(IntegrityError, match=way_out):
        next(Feed(course.store, course.job, 0, lambda: None).steps(0))


def _token_file(course: Course, record: Any) -> Any:
    from orchestrator.store.shards import token_file

    return token_file(course.store, "data/x/train", record)


def test_a_decoder_that_dies_is_replaced(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(len(SHARD_ROWS)):
        course.commit(shard)
    undisturbed = [[m.ids for m in micro] for _, micro in Feed(course.store, course.job, 0, lambda: None).steps(0)]
    decoders: list[Decoder] = []

    class Watched(Decoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            decoders.append(self)

    monkeypatch.setattr(feed, "Decoder", Watched)
    found, killed = [], set[int]()
    for step, micro_batches in Feed(course.store, course.job, 0, lambda: None).steps(0):
        found.append([micro.ids for micro in micro_batches])
        if step in (0, 3):
            killed.add(decoders[0]._process.pid)
            os.kill(decoders[0]._process.pid, signal.SIGKILL)
            time.sleep(0.1)
    assert decoders[0]._deaths >= 1 and len(killed) >= 1
    for one, other in zip(found, undisturbed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert decoders[0]._process.poll() is not None, "it ends with the feed"


def test_a_decoder_starts_without_torch() -> None:
    import subprocess
    import sys

    look = "import sys, orchestrator.student.decoder; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
