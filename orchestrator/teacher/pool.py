"""The teacher pool: Ray Data hands token shards, in the order in which training wants them, to teacher actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from orchestrator.runtime.session import quiet_ray_data
from orchestrator.spec.model import Replicas
from orchestrator.teacher.hand_out import handed_out
from orchestrator.teacher.labeller import Labeller, Labelling
from orchestrator.teacher.pace import Pace
from orchestrator.teacher.placement import Placement


def label_shards(
    work: Labelling, shards: Sequence[tuple[int, int]], replicas: Replicas, placement: Placement
) -> Iterator[dict[str, Any]]:
    """Label the held-out rows of `work`, if it has any, and then `shards`, pairs of (shard, position in the demand); yields
    a receipt for each as it is committed.

    A dead replica is replaced and its shard labelled again; an error that a teacher raises ends the iteration. Raises
    `EnvironmentFault` if the cluster has no room for `replicas.min`.
    """
    quiet_ray_data()
    rows = [{"heldout": False, "shard": shard, "position": position} for shard, position in shards]
    if work.heldout:
        rows.insert(0, {"heldout": True, "shard": 0, "position": 0})
    pool = ray.data.ActorPoolStrategy(min_size=replicas.min, max_size=replicas.max, max_tasks_in_flight_per_actor=2)
    with placement:
        placement.reserve(replicas.min)
        receipts = handed_out(rows).map_batches_internal(
            Labeller,
            fn_constructor_args=(work,),
            batch_size=1,
            compute=pool,
            num_cpus=work.replica.cpus,
            num_gpus=work.replica.gpus,
            # The one way to a placement group for each actor, until Ray Data's pools have their own (ray#64090); the public
            # map_batches takes it too, with a warning that it will go with Ray 2.64.
            ray_remote_args_fn=placement.options,
        )
        pace = Pace([int(row["position"]) for row in rows], work.labels.run_ahead, work.board)
        pace.govern(receipts)
        for receipt in receipts.iter_rows():
            held_s = pace.held_s(receipt["began_s"] - receipt["idle_s"], receipt["began_s"])
            yield receipt | {
                "idle_s": receipt["idle_s"] - held_s,
                "blocked_s": receipt["blocked_s"] + held_s,
                "replicas": placement.replicas(),
            }
