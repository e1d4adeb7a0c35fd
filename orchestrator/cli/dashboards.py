"""The verbs for watching runs in Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.usage import group

dashboards_app = group("dashboards", "Watch runs in Grafana.")


@dashboards_app.command("install")
def install(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; what an earlier version wrote is replaced.")],
    discovery: Annotated[Path | None, typer.Option(help="Ray's list of nodes, as Prometheus will see the file.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="Address of Prometheus, as Grafana will see it.")] = None,
) -> None:
    """Write Grafana's dashboards and provisioning, and Prometheus' configuration and alert rules."""
    from orchestrator.monitoring.install import DISCOVERY, PROMETHEUS_URL
    from orchestrator.monitoring.install import install as write
    from orchestrator.store.files import storage_faults

    with storage_faults(folder):
        for path in write(folder, discovery or DISCOVERY, prometheus or PROMETHEUS_URL):
            print(path)
