"""The teacher pool: Ray Data hands token shards, in the order in which training wants them, to teacher actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from orchestrator.runtime.session import quiet_ray_data
from orchestrator.spec.model import Replicas
from orchestrator.teacher.labeller import Labeller, Labelling


def label_shards(
    work: Labelling, shards: Sequence[tuple[int, int]], replicas: Replicas, cpus: float, gpus: float
) -> Iterator[dict[str, Any]]:
    """Label `shards`, pairs of (shard, position in the demand); yields a receipt for each as it is committed.

    A dead actor is replaced and its shard labelled again; an error that a teacher raises ends the iteration.
    """
    quiet_ray_data()
    rows = [{"shard": shard, "position": position} for shard, position in shards]
    pool = ray.data.ActorPoolStrategy(min_size=replicas.min, max_size=replicas.max, max_tasks_in_flight_per_actor=2)
    receipts = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Labeller,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=pool,
        num_cpus=cpus,
        num_gpus=gpus,
    )
    yield from receipts.iter_rows()
