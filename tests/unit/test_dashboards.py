"""Dashboards, rules and configuration: what is checked in is what is built, on the registry's names and no others."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from orchestrator.monitoring.boards import DASHBOARDS
from orchestrator.monitoring.install import install, portable_files
from orchestrator.tracking.names import METRICS

FOLDER = Path(__file__).parents[2] / "dashboards"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: apt-get install prometheus)")


def promtool(*args: str | Path) -> None:
    assert PROMTOOL is not None
    ended = subprocess.run([PROMTOOL, *map(str, args)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def pages() -> dict[str, dict[str, Any]]:
    """The checked-in dashboards, by file name."""
    return {f.name: json.loads(f.read_text()) for f in sorted((FOLDER / "grafana/dashboards").glob("*.json"))}


def rules() -> list[dict[str, Any]]:
    """The checked-in rules."""
    groups = YAML(typ="safe").load(FOLDER / "prometheus/rules.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions(page: dict[str, Any]) -> Iterator[str]:
    for panel in page["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in page["templating"]["list"]:
        yield variable.get("definition", "")


# What is checked in.


def test_what_is_checked_in_is_what_is_built() -> None:
    built = portable_files()
    assert {n: (FOLDER / n).read_text() for n in built} == built, "make dashboards"
    there = {str(f.relative_to(FOLDER)) for f in (FOLDER / "grafana/dashboards").iterdir()}
    assert there == {n for n in built if n.startswith("grafana/dashboards/")}, "a dashboard that nothing builds"


def test_names_are_exactly_those_of_the_registry() -> None:
    exprs = [e for page in pages().values() for e in expressions(page)] + [rule["expr"] for rule in rules()]
    used = {name for e in exprs for name in re.findall(r"\bray_distill_\w+", e)}
    assert used == {m.prometheus_name for m in METRICS.values() if m.exported}


def test_alerts_stand_on_recorded_series() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() if "alert" in rule for name in re.findall(r"\bdistill:[\w:]+", rule["expr"])}
    assert used and used <= recorded


def test_every_metric_of_the_registry_has_a_row_in_the_table() -> None:
    table = (FOLDER / "METRICS.md").read_text()
    assert all(f"`{m.prometheus_name if m.exported else m.name}`" in table for m in METRICS.values())


@pytest.mark.parametrize("page", pages().values(), ids=pages())
def test_a_page_is_laid_out_and_says_what_it_shows(page: dict[str, Any]) -> None:
    panels = page["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert len(panel["description"]) > 15 and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert {v["name"] for v in page["templating"]["list"]} >= {"datasource"}
    titles = [p["title"] for p in panels if p["type"] != "row"]
    assert len(set(titles)) == len(titles)


def test_panels_choose_the_run_that_is_chosen() -> None:
    """But for Ray's own metrics, which know no runs."""
    for page in pages().values():
        for expr in (t["expr"] for p in page["panels"] for t in p.get("targets", ())):
            for name, matchers in re.findall(r"(ray_distill_\w+)(\{.*?\})?", expr):
                running = name == METRICS["stage/running"].prometheus_name and "== 1" in expr
                assert 'run=~"$run"' in matchers or running, expr


# What is installed.


def test_install_writes_what_grafana_and_prometheus_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "dashboards", "install", tmp_path / "watch"]
    ended = subprocess.run([*map(str, command), "--prometheus", "http://prom:9090"], capture_output=True, text=True, check=True)
    written = {Path(line) for line in ended.stdout.splitlines()}
    assert written == {f for f in (tmp_path / "watch").rglob("*") if f.is_file()}
    provisioning = tmp_path / "watch/grafana/provisioning"
    providers = YAML(typ="safe").load(provisioning / "dashboards/distill.yml")["providers"]
    (ours,) = (p["options"]["path"] for p in providers if p["name"] == "Distill")
    assert {f.name for f in Path(ours).iterdir()} == {f"{d.uid}.json" for d in DASHBOARDS}
    (source,) = YAML(typ="safe").load(provisioning / "datasources/distill.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prom:9090")


@needs_promtool
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    install(tmp_path)
    promtool("check", "config", tmp_path / "prometheus/prometheus.yml")
    promtool("check", "rules", tmp_path / "prometheus/rules.yml")
    broken = tmp_path / "prometheus/rules.yml"
    broken.write_text(broken.read_text().replace("clamp_max(", "clamp_max((", 1))
    with pytest.raises(AssertionError, match="could not parse expression"):
        promtool("check", "config", tmp_path / "prometheus/prometheus.yml")


@needs_promtool
def test_every_query_is_well_formed(tmp_path: Path) -> None:
    """Prometheus parses each one, put into a rule."""
    exprs = [t["expr"] for page in pages().values() for p in page["panels"] for t in p.get("targets", ())]
    plain = [e.replace("$__rate_interval", "1m") for e in exprs]
    group = {"name": "queries", "rules": [{"record": f"q:{i}", "expr": e} for i, e in enumerate(plain)]}
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [group]}))
    promtool("check", "rules", tmp_path / "queries.yml")
