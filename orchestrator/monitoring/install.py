"""The files that Prometheus and Grafana read, made from the registry, the dashboards and the rules."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from orchestrator.monitoring.boards import DASHBOARDS
from orchestrator.monitoring.rules import rules
from orchestrator.tracking.names import METRICS

DISCOVERY = Path("/tmp/ray/prom_metrics_service_discovery.json")
"""File in which Ray's head node lists the targets to be scraped."""
SCRAPE_EVERY = "10s"
"""As often as Ray's processes report."""
RAY_DASHBOARDS = "/tmp/ray/session_latest/metrics/grafana/dashboards"
"""Ray's own dashboards, as its head node writes them; Ray's web page embeds these."""
PROMETHEUS_URL = "http://localhost:9090"


def portable_files(discovery: Path = DISCOVERY) -> dict[str, str]:
    """Contents by relative path of what is the same wherever it is installed."""
    pages = {f"grafana/dashboards/{d.uid}.json": json.dumps(d.json(), indent=1) + "\n" for d in DASHBOARDS}
    return pages | {
        "prometheus/prometheus.yml": _yaml(_prometheus(discovery)),
        "prometheus/rules.yml": _yaml(rules()),
        "METRICS.md": metrics_table(),
    }


def install(folder: Path, discovery: Path = DISCOVERY, prometheus_url: str = PROMETHEUS_URL) -> list[Path]:
    """Write everything into `folder`, over what an earlier version left there; returns the files."""
    pages = folder.absolute() / "grafana" / "dashboards"
    files = portable_files(discovery) | {
        "grafana/provisioning/dashboards/distill.yml": _yaml(_dashboard_providers(pages)),
        "grafana/provisioning/datasources/distill.yml": _yaml(_datasources(prometheus_url)),
    }
    written = [folder / name for name in files]
    for path, text in zip(written, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return written


def metrics_table() -> str:
    """The registry as a page of Markdown."""
    lines = [
        "# Metrics",
        "",
        "Made by `make dashboards` from `orchestrator/tracking/names.py`. Labels in Prometheus: `run`, `stage`, and",
        "`replica` where a value is of one teacher actor alone.",
        "",
        "| log and MLflow | Prometheus | type | unit | what it says |",
        "|---|---|---|---|---|",
    ]
    for m in METRICS.values():
        logged = f"`{m.name}`" if m.logged else ""
        exported = (f"`{m.prometheus_name}`", "counter" if m.kind == "count" else "gauge") if m.exported else ("", "")
        lines.append(f"| {logged} | {exported[0]} | {exported[1]} | {m.unit} | {m.help} |")
    return "\n".join(lines) + "\n"


def _prometheus(discovery: Path) -> dict[str, Any]:
    # Looked for again and again, because a file whose folder is not there yet cannot be watched.
    nodes = {"files": [str(discovery)], "refresh_interval": "15s"}
    return {
        "global": {"scrape_interval": SCRAPE_EVERY, "evaluation_interval": "15s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [nodes]}],
    }


def _dashboard_providers(pages: Path) -> dict[str, Any]:
    folders = {"Distill": str(pages), "Ray": RAY_DASHBOARDS}
    providers = [{"name": n, "folder": n, "type": "file", "options": {"path": path}} for n, path in folders.items()]
    return {"apiVersion": 1, "providers": providers}


def _datasources(prometheus_url: str) -> dict[str, Any]:
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus_url, "isDefault": True}
    return {"apiVersion": 1, "datasources": [source | {"jsonData": {"timeInterval": SCRAPE_EVERY}}]}


def _yaml(document: dict[str, Any]) -> str:
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(document, out)
    return out.getvalue()
