"""Checks, before any work starts, that the nodes of a cluster run the same code and see the same storage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import EnvironmentFault, find_user_error
from orchestrator.runtime.versions import code_digest, versions

ANSWER_S = 120.0
"""A node that has not answered by then has no working Ray worker to offer."""
VISIBLE_S = 5.0
"""A network file system shows a new file this soon."""
PROBES = "nodes"
SAME = ("python", "ray", "torch", "deepspeed", "transformers")
"""Packages that must have the same version on all nodes; `orchestrator` must also have the same source."""


class Shared(Protocol):
    """The part of a store that is tried."""

    def put_if_absent(self, key: str, data: bytes) -> bool: ...

    def read(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Node:
    id: str
    """Hex."""
    name: str
    """Its address; nodes that share one are told apart by the beginning of their id."""
    resources: dict[str, float]


def alive_nodes() -> list[Node]:
    """The nodes of the cluster, that of the driver first."""
    alive = [n for n in ray.nodes() if n["Alive"]]
    addresses = [n["NodeManagerAddress"] for n in alive]
    here = ray.get_runtime_context().get_node_id()
    found: list[Node] = []
    for node, address in zip(alive, addresses, strict=True):
        name = address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        found.append(Node(node["NodeID"], name, node["Resources"]))
    return sorted(found, key=lambda n: (n.id != here, n.name))


def hardware() -> list[dict[str, Any]]:
    """The machines of the cluster, that of the driver first: `node`, `cores`, `memory_bytes` and the names of its `gpus`.

    Raises `EnvironmentFault` if a node does not answer.
    """
    nodes = alive_nodes()
    found = _on_each(nodes, _cores_and_memory) if len(nodes) > 1 else {nodes[0].name: _cores_and_memory()}
    return [{"node": node.name, **found[node.name], "gpus": _gpus(node.resources)} for node in nodes]


def _cores_and_memory() -> dict[str, int]:
    return {"cores": os.cpu_count() or 1, "memory_bytes": psutil.virtual_memory().total}


def _gpus(resources: dict[str, float]) -> list[str]:
    """Ray names the kind of a node's accelerators as a resource, as `accelerator_type:H200`."""
    kinds = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    return [kinds[0] if kinds else "GPU"] * int(resources.get("GPU", 0))


def check_nodes(storage: Shared, where: str) -> None:
    """Raise `EnvironmentFault` unless all nodes run the same versions and share `storage`, which messages call `where`.

    Each node leaves one small file in the folder `nodes` of the storage, whatever the number of runs. A cluster of one
    node is not looked at.
    """
    nodes = alive_nodes()
    if len(nodes) > 1:
        check_same(_on_each(nodes, _installed))
        _on_each(nodes, _write_probe, storage)
        unseen = _on_each(nodes, _unseen_probes, storage, [node.id for node in nodes])
        check_shared(unseen, {node.id: node.name for node in nodes}, where)


def check_same(installed: dict[str, dict[str, str]]) -> None:
    """Raise `EnvironmentFault` for versions, by node and package, that are not those of the first node."""
    first, *others = installed
    ours = installed[first]
    skew = [(node, package) for node in others for package in ours if installed[node][package] != ours[package]]
    if skew:
        differing = list(dict.fromkeys(package for _, package in skew))
        listed = [f"{node}:{package}:{installed[node][package]}" for node, package in skew]
        here = [f"{first}:{package}:{ours[package]}" for package in differing]
        raise EnvironmentFault(f"nodes of the cluster differ: {', '.join(listed)}; but {', '.join(here)}")


def check_shared(unseen: dict[str, list[str]], names: dict[str, str], where: str) -> None:
    """Raise `EnvironmentFault` if some node (by name) does not see what others (by id) have written."""
    for node, ids in unseen.items():
        if ids:
            others = ", ".join(names[other] for other in ids)
            raise EnvironmentFault(f"storage {where}: node {node} does not see what {others} wrote; all must share it")


def _on_each(nodes: list[Node], function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return the result of `function(*args)` on each node, by the node's name."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    there = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
    references = [task.options(scheduling_strategy=strategy).remote(*args) for strategy in there]
    answers: dict[str, Any] = {}
    for node, reference in zip(nodes, references, strict=True):
        try:
            answers[node.name] = ray.get(reference, timeout=ANSWER_S)
        except GetTimeoutError as error:
            raise EnvironmentFault(f"node {node.name} does not answer within {ANSWER_S:.0f} s") from error
        except RayError as error:
            cause = find_user_error(error) or getattr(error, "cause", None) or error
            raise EnvironmentFault(f"node {node.name}: {cause}") from error
    return answers


def _installed() -> dict[str, str]:
    found = versions()
    return {package: found.get(package, "missing") for package in SAME} | {"orchestrator": code_digest()}


def _write_probe(storage: Shared) -> None:
    node_id = ray.get_runtime_context().get_node_id()
    storage.put_if_absent(f"{PROBES}/{node_id}", node_id.encode())


def _unseen_probes(storage: Shared, ids: list[str]) -> list[str]:
    end = time.monotonic() + VISIBLE_S
    while (unseen := [i for i in ids if not _seen(storage, i)]) and time.monotonic() < end:
        time.sleep(0.2)
    return unseen


def _seen(storage: Shared, node_id: str) -> bool:
    try:
        return storage.read(f"{PROBES}/{node_id}") == node_id.encode()
    except FileNotFoundError:
        return False
