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
from orchestrator.teacher.labeller import Labelling
from orchestrator.teacher.make import make_teacher
from orchestrator.teacher.placement import Placement

FITTED_ROWS = 256
"""At most: many times as many positions as a teacher is wide."""


def calibrate(work: Labelling, shard: int, placement: Placement) -> None:
    """Fit what `work.labels` need on token shard `shard`, and keep it in the log; nothing to do if it is there.

    The first basis that is kept stays: labels made from it must be read with it.
    """
    if principal_ranks(work.labels) and LabelLog(work.store, work.log_key).kept(BASIS) is None:
        with placement:
            placement.reserve(1)
            actor: Any = _Calibrator.options(**placement.options()).remote()
            ray.get(actor.fit.remote(work, shard))


@ray.remote(max_restarts=3, max_task_retries=3)
class _Calibrator:
    """An actor, as whoever leads a gang must be."""

    def fit(self, work: Labelling, shard: int) -> None:
        _fit(work, shard)


def _fit(work: Labelling, shard: int) -> None:
    limit_threads(work.replica.threads)
    torch.set_num_threads(work.replica.threads)
    manifest = TokenManifest.load(work.store, f"{work.data_folder}/{MANIFEST}")
    assert manifest is not None
    record = manifest.train.record(work.store, shard)
    rows = range(min(record.rows, FITTED_ROWS))
    tokens = read_rows(work.store, manifest.train.folder, record, rows, manifest.group_rows)
    ids = torch.from_numpy(tokens.ids[:, :-1]).long()
    teacher = make_teacher(work)
    moments: dict[str, Moments] = {}
    ranks = principal_ranks(work.labels)
    for part in ids.split(work.micro_batch):
        answer = teacher.answer(part)
        for name in ranks:
            vectors = answer.states if name == "states" else answer.features[name]
            moments.setdefault(name, Moments(vectors.shape[-1])).add(vectors)
    bases = {name: Basis.fit(moments[name], rank) for name, rank in ranks.items()}
    LabelLog(work.store, work.log_key).keep(BASIS, to_bytes(bases))
