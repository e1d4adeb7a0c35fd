"""The pass before labelling that fits the bases of vectors stored by coordinates."""

from __future__ import annotations

from typing import Any

import ray
import torch

from orchestrator.labels.basis import BASIS, Basis, Moments, to_bytes
from orchestrator.runtime.environment import limit_threads
from orchestrator.spec.labels import principal_ranks
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import MANIFEST, TokenManifest
from orchestrator.store.shards import read_rows
from orchestrator.teacher.make import make_teacher
from orchestrator.teacher.placement import Placement
from orchestrator.teacher.task import LabelTask

FITTED_ROWS = 256
"""At most: many times as many positions as a teacher is wide."""


def calibrate(task: LabelTask, shard: int, placement: Placement) -> None:
    """Fit the bases that `task.labels` need on token shard `shard`, and keep them in the log, unless they are there.

    The first basis that is kept stays: labels made from it must be read with it.
    """
    if principal_ranks(task.labels) and LabelLog(task.store, task.log_key).kept(BASIS) is None:
        with placement:
            placement.reserve(1)
            actor: Any = _Calibrator.options(**placement.options()).remote()
            ray.get(actor.fit.remote(task, shard))


@ray.remote(max_restarts=3, max_task_retries=3)
class _Calibrator:
    """Fits bases; an actor, because only an actor may lead a sharded teacher."""

    def fit(self, task: LabelTask, shard: int) -> None:
        _fit(task, shard)


def _fit(task: LabelTask, shard: int) -> None:
    limit_threads(task.replica.threads)
    torch.set_num_threads(task.replica.threads)
    manifest = TokenManifest.load(task.store, f"{task.data_folder}/{MANIFEST}")
    assert manifest is not None
    record = manifest.train.record(task.store, shard)
    rows = range(min(record.rows, FITTED_ROWS))
    tokens = read_rows(task.store, manifest.train.folder, record, rows, manifest.group_rows)
    ids = torch.from_numpy(tokens.ids[:, :-1]).long()
    teacher = make_teacher(task)
    moments: dict[str, Moments] = {}
    ranks = principal_ranks(task.labels)
    for part in ids.split(task.micro_batch):
        answer = teacher.answer(part)
        for name in ranks:
            vectors = answer.states if name == "states" else answer.features[name]
            moments.setdefault(name, Moments(vectors.shape[-1])).add(vectors)
    bases = {name: Basis.fit(moments[name], rank) for name, rank in ranks.items()}
    LabelLog(task.store, task.log_key).keep(BASIS, to_bytes(bases))
