"""Grafana dashboards as values: what a panel shows, and the classic JSON model that Grafana reads (any version from 9 on)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

COLUMNS = 24
"""Width of a Grafana page."""
DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and how Grafana names its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One chart (`timeseries`) or its last values (`stat`)."""

    title: str
    description: str
    queries: Sequence[Query]
    unit: str
    """A unit id of Grafana's: s, bytes, percentunit, short, ..."""
    kind: Literal["timeseries", "stat"] = "timeseries"
    thresholds: Sequence[tuple[float, str]] = ()
    """(from which value, colour), ascending; green below the first."""
    texts: Sequence[tuple[float, str, str]] = ()
    """(value, text, colour) for values that stand for something."""
    log_scale: bool = False
    width: int = 8
    optional: str | None = None
    """Why there may be nothing to see on a run that is well; None: there always is something."""

    def json(self, number: int, x: int, y: int) -> Json:
        steps = [{"color": "green", "value": None}, *({"color": c, "value": v} for v, c in self.thresholds)]
        defaults: Json = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.optional:
            defaults["noValue"] = "none"
        if self.texts:
            options = {f"{value:g}": {"text": text, "color": color} for value, text, color in self.texts}
            defaults["mappings"] = [{"type": "value", "options": options}]
        if self.kind == "timeseries":
            custom: Json = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}
            custom |= {"thresholdsStyle": {"mode": "dashed" if self.thresholds else "off"}}
            custom |= {"scaleDistribution": {"type": "log", "log": 10}} if self.log_scale else {}
            defaults["custom"] = custom
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description + (f" Empty where {self.optional}." if self.optional else ""),
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": STAT if self.kind == "stat" else TIMESERIES,
            "targets": [
                {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": q.expr, "legendFormat": q.legend, "range": True}
                for i, q in enumerate(self.queries)
            ],
        }

    @property
    def height(self) -> int:
        return 4 if self.kind == "stat" else 8


STAT: Json = {
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    "colorMode": "background",
    "graphMode": "none",
    "textMode": "value_and_name",
}
TIMESERIES: Json = {
    "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


@dataclass(frozen=True)
class Row:
    """A headline and the panels below it, laid out from left to right."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of the page: the values that `label` has in `metric`."""

    name: str
    title: str
    metric: str
    label: str

    def json(self) -> Json:
        query = f"label_values({self.metric}, {self.label})"
        return {
            "name": self.name,
            "label": self.title,
            "type": "query",
            "datasource": DATASOURCE,
            "definition": query,
            "query": {"query": query, "refId": self.name},
            "refresh": 2,  # whenever the time range changes
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }


@dataclass(frozen=True)
class Dashboard:
    """A page of Grafana's."""

    uid: str
    title: str
    description: str
    variable: Variable
    rows: Sequence[Row]

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]

    def json(self) -> Json:
        source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["distill"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,  # one crosshair for all panels
            "refresh": "15s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": [source, self.variable.json()]},
            "links": [{"type": "dashboards", "title": "distill", "tags": ["distill"], "keepTime": True, "includeVars": True}],
            "panels": list(_laid_out(self.rows)),
        }


def _laid_out(rows: Sequence[Row]) -> Iterator[Json]:
    number, y = 1, 0
    for row in rows:
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        number, x, y = number + 1, 0, y + 1
        height = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            yield panel.json(number, x, y)
            number, x, height = number + 1, x + panel.width, max(height, panel.height)
        y += height
