"""Connecting to Ray: a fresh local one, or a cluster that is already there."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from orchestrator.errors import EnvironmentFault
from orchestrator.runtime.environment import prepare_ray
from orchestrator.runtime.signals import heed_signals, signals_heeded, undisturbed
from orchestrator.spec.job import Cluster

CONNECT_S = 5.0


@contextmanager
def ray_session(cluster: Cluster, cpu_slots: int) -> Generator[None]:
    """Hold a connection to Ray. Raises `EnvironmentFault` if there is none to be had.

    A process that is connected already keeps its cluster and its connection.
    """
    prepare_ray(local=cluster.address == "local")
    import ray

    if ray.is_initialized():
        yield
        return
    with signals_heeded():
        try:
            _connect(ray, cluster, cpu_slots)
            heed_signals()  # again: Ray installs a handler of SIGTERM that ends the process itself
            yield
        finally:
            with undisturbed():  # a shutdown that is broken off leaves processes behind
                ray.shutdown()


def knock(host: str, port: int) -> None:
    """Raise `OSError` within seconds if nobody listens there."""
    socket.create_connection((host, port), timeout=CONNECT_S).close()


def lost_cluster(error: BaseException) -> bool:
    """Return whether `error` says that Ray, or a process that Ray ran, is gone; results on storage are not lost."""
    import ray.exceptions as lost

    kinds = (lost.RayActorError, lost.WorkerCrashedError, lost.ObjectLostError, lost.RpcError, lost.NodeDiedError)
    return isinstance(error, kinds)


def quiet_ray_data() -> None:
    """No progress bars and no log of Ray Data's own: the driver draws one display for the whole run."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # wrapped by Ray Data, it would lose its cause on the way to the driver
    # Its detectors write to that log alone, and ask for the options of an actor that they do not start: the teacher pool would
    # hold room for it.
    context.issue_detectors_config.detectors = []


def capacity() -> dict[str, float]:
    """The most of each kind (CPU, GPU) that the cluster can have: what is there, or what its autoscaler may make of it.

    Ray's own autoscalers (2.60) add nodes up to a limit that they tell nobody (ray#63012); that counts as no limit.
    """
    import ray
    from ray._private.state import state
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    have, limit = ray.cluster_resources(), state.get_max_resources_from_cluster_config()
    untold = sys.maxsize if limit is None and is_autoscaler_v2() else 0
    return {kind: max(have.get(kind, 0), (limit or {}).get(kind, untold)) for kind in ("CPU", "GPU")}


def check_resources(needed: dict[str, float], what: str) -> None:
    """Raise `EnvironmentFault` if the cluster could never hold `needed` (CPU, GPU) at once."""
    have = capacity()
    for kind, amount in needed.items():
        if amount > have[kind]:
            raise EnvironmentFault(f"{what} need {amount:g} {kind} at once, the cluster has {have[kind]:g}")


def replicas_that_fit(each: dict[str, float], beside: dict[str, float]) -> int:
    """Return how many times `each` (CPU, GPU) fits on the cluster when `beside` is taken."""
    have = capacity()
    return min(int((have[kind] - beside[kind]) // amount) for kind, amount in each.items() if amount)


def _connect(ray: Any, cluster: Cluster, cpu_slots: int) -> None:
    from ray.exceptions import AuthenticationError

    try:
        _init(ray, cluster, cpu_slots)
    except AuthenticationError as error:
        raise EnvironmentFault(f"cluster.address: Ray at {cluster.address} answers 401: token absent or wrong") from error
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(f"cluster.address: cannot reach Ray at {cluster.address}: {error}") from error
    except Exception as error:  # Ray has no class of its own for a node that starts too slowly
        if "timed out during startup" not in str(error):
            raise
        raise EnvironmentFault(
            "Ray did not start in time: this machine is busy or short of memory; run the same job again when it is not, or set "
            "RAY_raylet_start_wait_time_s=600"
        ) from error


def _init(ray: Any, cluster: Cluster, cpu_slots: int) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == "local":
        ray.init(address="local", num_cpus=cpu_slots, include_dashboard=cluster.dashboard, **common)
    else:
        host, _, port = cluster.address.rpartition("//")[2].rpartition(":")
        if port.isdecimal():
            knock(host, int(port))  # Ray itself would try for minutes
        ray.init(address=cluster.address, **common)
