"""Room for the teacher's replicas: a placement group each, with a bundle for every shard, so that all of them run or none.

The actor of Ray Data's pool is put into the first bundle of a group and is the replica's first shard; it starts the others in
the other bundles (gang.py). So the room that Ray Data counts for an actor is a bundle's, and is in use. The groups belong to
the driver: a replica that dies comes back in its own group, and when the driver is gone Ray removes them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.errors import EnvironmentFault
from orchestrator.spec.model import TeacherBase

SAY_EVERY_S, COUNT_EVERY_S = 30.0, 1.0


def in_bundle(group: PlacementGroup, index: int, cpus: float, gpus: float) -> dict[str, Any]:
    """Return Ray's options for an actor in bundle `index` of `group`."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}


def leave_placement() -> None:
    """Give back the room of the replica that this process is the first shard of; ends the process."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        remove_placement_group(group)


class Placement:
    """The placement groups of one labelling; a context that leaves none behind. Safe to use from several threads."""

    def __init__(self, log_key: str, teacher: TeacherBase, say: Callable[[str], None]) -> None:
        self._name, self._teacher, self._say = f"teacher-{log_key[:16]}", teacher, say
        self._bundle = {"CPU": teacher.cpus_per_shard} | ({"GPU": teacher.gpus_per_shard} if teacher.gpus_per_shard else {})
        self._groups: dict[str, PlacementGroup] = {}
        """The placement groups, by the name of the actor that leads in each."""
        self._lock = Lock()  # Ray Data starts actors in a thread of its own
        self._counted, self._replicas = 0.0, 0

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            for group in self._groups.values():
                remove_placement_group(group)
            self._groups.clear()

    def reserve(self, replicas: int) -> None:
        """Wait until there is room for `replicas`, and hold it.

        Says what is missing every now and then; raises `EnvironmentFault` after `teacher.placement_timeout_s`.
        """
        with self._lock:
            groups = [self._groups[self._reserve()] for _ in range(replicas)]
        began = said = time.monotonic()
        while missing := [group for group in groups if not group.wait(1)]:
            waited = time.monotonic() - began
            if waited > self._teacher.placement_timeout_s:
                need, have, free = (", ".join(row) for row in zip(*self._table(len(missing)), strict=True))
                each = f"{self._teacher.shards} shards" + (" on one node" if self._fits_a_node() else "")
                raise EnvironmentFault(
                    f"teacher.shards: no room for {len(missing)} of {replicas} replicas of {each} in {waited:.0f} s: "
                    f"need {need}; the cluster has {have}; free are {free}"
                )
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                self._say(f"labels: waiting for room for {len(missing)} of {replicas} teacher replicas, {waited:.0f} s so far")
                for need, have, free in self._table(len(missing)):
                    self._say(f"  need {need:<12} have {have:<12} free {free}")

    def options(self) -> dict[str, Any]:
        """Return Ray's options for the actor that leads one more replica."""
        with self._lock:
            # An actor that Ray Data gave up before it ran could not give its room back.
            vacant = next((name for name in self._states() if not _lives(name)), None)
            name = vacant or self._reserve()
            group = self._groups[name]
        return {"name": name} | in_bundle(group, 0, self._teacher.cpus_per_shard, self._teacher.gpus_per_shard)

    def replicas(self) -> int:
        """Return how many replicas have their room, as of at most a second ago."""
        with self._lock:
            if time.monotonic() - self._counted > COUNT_EVERY_S:
                self._counted = time.monotonic()
                self._replicas = sum(state == "CREATED" for state in self._states().values())
            return self._replicas

    def _states(self) -> dict[str, str]:
        """Return the state of every group by name, and forget those that were given back."""
        known = {str(row["name"]): str(row["state"]) for row in placement_group_table().values()}
        for name in list(self._groups):
            if known.get(name, "REMOVED") == "REMOVED":
                del self._groups[name]
        return {name: known[name] for name in self._groups}

    def _reserve(self) -> str:
        name = f"{self._name}-{uuid4().hex[:8]}"
        strategy = "STRICT_PACK" if self._fits_a_node() else "PACK"  # shards exchange in every block
        self._groups[name] = placement_group([self._bundle] * self._teacher.shards, strategy=strategy, name=name)
        return name

    def _fits_a_node(self) -> bool:
        """Return whether some node could hold all shards of a replica if it were empty."""
        need = {kind: each * self._teacher.shards for kind, each in self._bundle.items()}
        nodes: list[dict[str, Any]] = ray.nodes()
        return any(node["Alive"] and all(node["Resources"].get(k, 0) >= n for k, n in need.items()) for node in nodes)

    def _table(self, replicas: int) -> list[tuple[str, str, str]]:
        """Return, for each kind of resource, what `replicas` need, what the cluster has, and how much of it is free."""
        have, free = ray.cluster_resources(), ray.available_resources()
        return [
            (
                f"{each * self._teacher.shards * replicas:g} {kind}",
                f"{have.get(kind, 0):g} {kind}",
                f"{free.get(kind, 0):g} {kind}",
            )
            for kind, each in self._bundle.items()
        ]


def _lives(name: str) -> bool:
    """Return whether an actor of this name runs or is about to."""
    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True
