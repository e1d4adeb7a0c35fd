"""Load of the driver's machine, measured by MLflow's own monitors and written into the run's log.

MLflow's monitoring thread gives up at the first request that fails. Through the log, a sample outlasts a server that is away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from orchestrator.tracking.spool import Spool

EVERY_S = 10.0


@contextmanager
def system_metrics(spool: Spool, stage: str, began_s: float) -> Generator[None]:
    """Append a sample to `spool`, as a point of `stage`, every `EVERY_S` or $MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL seconds.

    A point's step is the number of seconds since the Unix time `began_s`.
    """
    stop = threading.Event()

    def sample() -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL as INTERVAL_S

        monitors = _monitors()
        while not stop.wait(INTERVAL_S.get() or EVERY_S):
            values: dict[str, float] = {}
            for monitor in monitors:
                with suppress(Exception):  # a driver that fails costs its own values and no others
                    monitor.collect_metrics()
                    values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
            with suppress(OSError):  # a full disk is reported by those who need it
                spool.append(stage, int(time.time() - began_s), values, time.time())

    thread = threading.Thread(target=sample, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()


def _monitors() -> list[Any]:
    """MLflow's monitors of what this machine has; those of GPUs refuse to be made where there is none."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for gpu_monitor in (GPUMonitor, ROCMMonitor):
        with suppress(Exception):
            monitors.append(gpu_monitor())
    return monitors
