"""Loading a teacher: into this process, into several that this one leads, or none where a server answers."""

from __future__ import annotations

from orchestrator.spec.labels import TopkLabels
from orchestrator.teacher.backend import Replica, Teacher, TransformersBackend
from orchestrator.teacher.gang import Gang
from orchestrator.teacher.task import LabelTask
from orchestrator.teacher.vllm import VllmBackend


def make_teacher(task: LabelTask) -> Teacher:
    """Load the teacher whose answers become the labels of `task`, or connect to the server that answers in its place."""
    if task.vllm:
        assert isinstance(task.labels, TopkLabels)
        return VllmBackend(task.vllm, task.labels.k, task.vocab_size)
    return load_replica(task.replica)


def load_replica(replica: Replica) -> Teacher:
    """Load `replica`; if it has several shards, this must be an actor in a placement group of as many bundles."""
    return Gang(replica) if replica.shards > 1 else TransformersBackend(replica)
