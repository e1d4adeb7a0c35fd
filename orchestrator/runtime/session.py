"""Connecting to Ray: a fresh local one, or a cluster that is already there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.errors import EnvironmentFault
from orchestrator.runtime.environment import prepare_ray
from orchestrator.spec.job import Cluster


@contextmanager
def ray_session(cluster: Cluster, cpu_slots: int, log_to_driver: bool = False) -> Iterator[str]:
    """Hold a connection to Ray; yields a line that says to what. Raises `EnvironmentFault` if there is none to be had.

    A process that is connected already keeps its cluster and its connection.
    """
    prepare_ray(local=cluster.address == "local")
    import ray

    if ray.is_initialized():
        yield f"ray {ray.get_runtime_context().gcs_address}"
        return
    try:
        _connect(ray, cluster, cpu_slots, log_to_driver)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"cluster.address: cannot reach Ray at {cluster.address}: {error}") from error
    try:
        yield f"ray {ray.get_runtime_context().gcs_address}"
    finally:
        ray.shutdown()


def quiet_ray_data() -> None:
    """No progress bars and no log of Ray Data's own: the driver draws one display for the whole run."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def check_resources(needed: dict[str, float], what: str) -> None:
    """Raise `EnvironmentFault` if the cluster could never hold `needed` (CPU, GPU) at once."""
    import ray

    have = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount > have.get(kind, 0):
            raise EnvironmentFault(f"{what} need {amount:g} {kind} at once, the cluster has {have.get(kind, 0):g}")


def _connect(ray: Any, cluster: Cluster, cpu_slots: int, log_to_driver: bool) -> None:
    common: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if cluster.address == "local":
        ray.init(address="local", num_cpus=cpu_slots, include_dashboard=cluster.dashboard, **common)
    else:
        ray.init(address=cluster.address, **common)
