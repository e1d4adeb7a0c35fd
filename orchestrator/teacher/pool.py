"""The teacher pool: Ray Data hands token shards, in the order in which training wants them, to teacher actors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import ray.data

from orchestrator.errors import ResumableError
from orchestrator.runtime.session import quiet_ray_data
from orchestrator.spec.model import Replicas
from orchestrator.teacher.hand_out import handed_out
from orchestrator.teacher.labeller import Labeller
from orchestrator.teacher.pace import Pace
from orchestrator.teacher.placement import Placement
from orchestrator.teacher.task import Item, LabelTask

LOOK_EVERY_S = 1.0
CALLS = 2
"""Shards that an actor has at a time: one that its teacher answers, and one that is packed and committed."""
GROW_AT = 0.75
"""The share of `CALLS` in use from which the pool grows; Ray Data's own, 1.75, is meant for calls that queue."""


def label_shards(
    task: LabelTask, shards: Sequence[tuple[int, int]], replicas: Replicas, placement: Placement
) -> Iterator[dict[str, Any]]:
    """Label the held-out rows of `task`, if it has any, and then `shards`, pairs of (shard, position in the demand).

    Prompts are continued after that. Yields a receipt of each as it is committed, here or by another run that shares the log,
    and one of each that is deferred because another run has claimed it. Those of shards that were committed elsewhere after the
    pool had nothing left to do name no `replica`. A dead replica is replaced and its shard labelled again; an error that a
    teacher raises ends the iteration. Raises `EnvironmentFault` if the cluster has no room for `replicas.min`, and
    `ResumableError` for a replica that dies again and again.
    """
    items = _heldout_items(task) + [Item("shard", shard, position) for shard, position in shards]
    if task.answering and task.answering.continues:
        items.append(Item("continuations"))
    with task.claims.kept_alive():
        while items:
            yield from _pass(task, items, replicas, placement)
            items = yield from _await_others(task)


def _heldout_items(task: LabelTask) -> list[Item]:
    """Return what is labelled first: should a teacher fail on held-out rows, that is known before anything was lost."""
    watched = [Item("watched")] if task.heldout else []
    measured = task.answering.shards if task.answering else ()
    return watched + [Item("measured", shard) for shard in measured]


def _pass(task: LabelTask, items: list[Item], replicas: Replicas, placement: Placement) -> Iterator[dict[str, Any]]:
    """Hand out `items` once; yields their receipts."""
    quiet_ray_data()
    rows = [item._asdict() for item in items]
    pool = ray.data.ActorPoolStrategy(
        min_size=replicas.min,
        max_size=replicas.max,
        max_tasks_in_flight_per_actor=CALLS,
        max_concurrent_calls_per_actor=CALLS,
        enable_true_multi_threading=True,
    )
    with placement:
        placement.reserve(replicas.min)
        receipts = handed_out(rows).map_batches_internal(
            Labeller,
            fn_constructor_args=(task,),
            batch_size=1,
            compute=pool,
            num_cpus=task.replica.cpus,
            num_gpus=task.replica.gpus,
            # The one way to a placement group for each actor, until Ray Data's pools have their own (ray#64090); the public
            # map_batches takes it too, with a warning that it will go with Ray 2.64.
            ray_remote_args_fn=placement.options,
        )
        receipts.context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_AT
        pace = Pace([item.position for item in items], task.labels.run_ahead, task.board)
        pace.govern(receipts)
        for receipt in receipts.iter_rows():
            held_s = pace.held_s(receipt["began_s"] - receipt["idle_s"], receipt["began_s"])
            yield receipt | {
                "idle_s": receipt["idle_s"] - held_s,
                "blocked_s": receipt["blocked_s"] + held_s,
                "replicas": placement.replicas(),
            }


def _await_others(task: LabelTask) -> Generator[dict[str, Any], None, list[Item]]:
    """Wait until no deferred item is claimed elsewhere; yields receipts of those that others commit, returns the rest.

    Raises `ResumableError` if the run is to end meanwhile.
    """
    waiting = list(itertools.starmap(Item, ray.get(task.board.deferred.remote())))
    free: list[Item] = []
    while waiting:
        for item in list(waiting):
            is_free = task.claims.is_free(item.claim)  # asked first: whoever commits it gives the claim up afterwards
            record = task.log_of(item).committed(item.shard)
            if record is not None:
                yield {"heldout": item.kind != "shard", "outcome": "found", "rows": record.rows, "bytes": record.bytes}
            elif is_free:
                free.append(item)
            else:
                continue
            waiting.remove(item)
            ray.get(task.board.settle.remote(tuple(item)))
        reason = ray.get(task.board.aborted.remote())
        if reason:
            raise ResumableError(f"labelling stopped: {reason}")
        if waiting:
            time.sleep(LOOK_EVERY_S)
    return free
