"""What the parts of a run ask Ray for at once, by Ray's own names of the kinds."""

from __future__ import annotations

from orchestrator.spec.model import TeacherBase, labelled_by
from orchestrator.spec.train import Train

Resources = dict[str, float]


def replica_takes(teacher: TeacherBase) -> Resources:
    """Of one replica that labels, all its shards together."""
    replica = labelled_by(teacher)
    return {"CPU": replica.cpus_per_replica, "GPU": replica.gpus_per_replica}


def training_takes(train: Train) -> Resources:
    """Of all workers together."""
    return {"CPU": train.workers * train.cpus_per_worker, "GPU": train.workers * train.gpus_per_worker}
