"""Which teacher there is: in this process, led by it, or behind a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.spec.labels import TopkLabels
from orchestrator.teacher.backend import Replica, Teacher, TransformersBackend
from orchestrator.teacher.gang import Gang
from orchestrator.teacher.vllm import VllmBackend

if TYPE_CHECKING:
    from orchestrator.teacher.labeller import Labelling


def make_teacher(work: Labelling) -> Teacher:
    """Who answers for the labels of `work`."""
    if work.vllm:
        assert isinstance(work.labels, TopkLabels)
        return VllmBackend(work.vllm, work.labels.k, work.vocab_size)
    return load_replica(work.replica)


def load_replica(replica: Replica) -> Teacher:
    """Load `replica` here; one of several shards takes an actor in a placement group of as many bundles."""
    return Gang(replica) if replica.shards > 1 else TransformersBackend(replica)
