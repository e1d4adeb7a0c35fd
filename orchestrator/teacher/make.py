"""Which teacher a labelling has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.spec.labels import TopkLabels, kept_features
from orchestrator.store.files import local_folder
from orchestrator.teacher.backend import Teacher, TransformersBackend
from orchestrator.teacher.gang import Gang
from orchestrator.teacher.vllm import VllmBackend

if TYPE_CHECKING:
    from orchestrator.teacher.labeller import Labelling


def make_teacher(work: Labelling) -> Teacher:
    """The teacher of `work`: in this process, led by it, or behind a server."""
    if work.vllm:
        assert isinstance(work.labels, TopkLabels)
        return VllmBackend(work.vllm, work.labels.k, work.vocab_size)
    if work.shards > 1:
        return Gang(work)
    return TransformersBackend(local_folder(work.model), work.dtype, kept_features(work.labels), work.gpus)
