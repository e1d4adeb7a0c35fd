"""A real Prometheus, with the configuration that is installed, scrapes a real run: every panel has something to show.

`make dashboards-check` prints what each panel showed.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.monitoring.boards import DASHBOARDS
from orchestrator.monitoring.install import install
from orchestrator.tracking.names import METRICS
from tests.tiny import (
    DISTILL,
    GLOBAL_BATCH,
    STEPS,
    TRAINER,
    Json,
    commits,
    eventually,
    kill,
    metric_points,
    started,
    steps_seen,
    tiny_job,
    write_corpus,
    write_job,
)

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus here (Debian: apt-get install prometheus)"),
]

EVERYTHING = {
    "labels": {"kind": "sampled", "samples": 20, "run_ahead": 4, "features": {"keep": [{"layer": 2}]}},
    "objective": {"alpha": 0.1, "features": [{"kind": "cosine", "weight": 1.0}]},
    "student": {
        "kind": "config",
        "model": {
            "type": "mixtral",
            "config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
        },
        "mtp_depth": 1,
    },
    "evaluate": {"rows": 8, "baseline": True},
    "cluster": {"dashboard": True},
}
"""What makes as many panels as possible show something."""


@dataclass(frozen=True)
class Watched:
    """A Prometheus that has watched a run from `start` to `end`, Unix times."""

    url: str
    start: float
    end: float
    storage: Path

    def get(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as reply:
            return json.load(reply)["data"]

    def shown(self, expr: str) -> list[Json]:
        """The series of `expr` over the whole run that have a finite value."""
        for name, value in (("$__rate_interval", "10s"), ("$run", ".*"), ("$session", ".*")):
            expr = expr.replace(name, value)
        found = self.get("query_range", query=expr, start=self.start, end=self.end, step=1)["result"]
        return [s for s in found if any(math.isfinite(float(value)) for _, value in s["values"])]


@contextmanager
def prometheus(folder: Path, discovery: Path) -> Iterator[str]:
    """The address of a Prometheus that runs with what `distill dashboards install` writes, but looks every second."""
    install(folder, discovery)
    config = folder / "prometheus/prometheus.yml"
    config.write_text(re.sub(r"interval: \d+s", "interval: 1s", config.read_text()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert PROMETHEUS is not None
    options = (f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}")
    with (folder / "log").open("wb") as log, subprocess.Popen([PROMETHEUS, *options], stdout=log, stderr=log) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run with all kinds of losses, one of whose training workers is killed."""
    folder = tmp_path_factory.mktemp("watched")
    job = tiny_job(write_corpus(folder / "corpus"), folder / "store")
    job |= EVERYTHING
    with (
        tempfile.TemporaryDirectory(prefix="d", ignore_cleanup_errors=True) as short,  # Ray's sockets want short paths
        prometheus(folder / "watch", Path(short, "ray/prom_metrics_service_discovery.json")) as url,
    ):
        env = {"RAY_TMPDIR": short, "RAY_metrics_report_interval_ms": "1000"}
        start = time.time()
        with started(folder / "log", *DISTILL, "run", write_job(job), env=env) as command:
            eventually(lambda: not command.running or steps_seen(folder / "store") > 50, "steps of the student")
            assert any([kill(process) for process in command.members(TRAINER)]), command.stderr
            command.wait().assert_ok()
        yield Watched(url, start, time.time(), folder / "store")


def test_every_panel_shows_something(watched: Watched) -> None:
    empty, missing = [], []
    for board in DASHBOARDS:
        for panel in board.panels:
            counts = [len(watched.shown(query.expr)) for query in panel.queries]
            print(f"{board.title:24} {panel.title:48} {counts} {'optional' if panel.optional else ''}")
            if not all(counts):
                (empty if panel.optional else missing).append(f"{board.title}: {panel.title}")
    print(f"empty, and may be: {empty}")
    assert not missing
    assert not watched.shown("ray_distill_there_is_no_such_metric")


def test_choices_at_the_top_have_values(watched: Watched) -> None:
    for board in DASHBOARDS:
        variable = board.variable
        values = {s["metric"].get(variable.label) for s in watched.shown(f"count by ({variable.label}) ({variable.metric})")}
        assert values and all(values), board.title
    runs = watched.shown(f"count by (run) ({METRICS['stage/running'].prometheus_name})")
    assert [s["metric"]["run"] for s in runs] == ["tiny"]


def test_rules_are_worked_out_and_the_death_is_reported(watched: Watched) -> None:
    rules = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    fired = {s["metric"]["alertname"] for s in watched.shown('ALERTS{alertstate="firing"}')}
    assert fired == {"DistillRestarts"}


def test_metrics_say_what_happened(watched: Watched) -> None:
    """Against what the run left on disk."""

    def counted(name: str, stage: str) -> float:
        """The last value of a counter; over all of its labels."""
        return sum(float(s["values"][-1][1]) for s in watched.shown(f'ray_distill_{name}_total{{stage="{stage}"}}'))

    (manifest,) = (json.loads(f.read_text()) for f in watched.storage.glob("data/*/manifest.json"))
    rows = sum(json.loads(record)["rows"] for record in commits(watched.storage).values())
    assert counted("label_tokens", "labels") == rows * manifest["seq_len"]
    trained = STEPS * GLOBAL_BATCH * manifest["seq_len"]
    assert counted("train_tokens", "baseline") == trained
    assert trained <= counted("train_tokens", "student") < 2 * trained, "some steps were done again"
    assert (counted("train_restarts", "student"), counted("train_restarts", "baseline")) == (1, 0)
    (seen,) = watched.shown('ray_distill_train_loss{stage="baseline"}')
    losses = {float(value) for _, value in seen["values"]}
    assert len(losses) > 5 and losses <= {p["metrics"]["train/loss"] for p in metric_points(watched.storage, "baseline")}
    over = watched.get("query", query="ray_distill_stage_running", time=watched.end)["result"]
    assert over == [], "gauges end with the run"
