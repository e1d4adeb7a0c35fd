"""What a real Ray makes of a run's metrics, scraped from its node as Prometheus would."""

from __future__ import annotations

import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.monitoring.exporter import Exporter
from orchestrator.runtime.environment import prepare_ray
from orchestrator.tracking import names
from orchestrator.tracking.names import METRICS

REPORT_S = 1
Scrape = Callable[[], dict[tuple[str, str, str], float]]


@pytest.fixture(scope="module")
def scrape() -> Iterator[Scrape]:
    """Scrapes a local Ray that reports every second: value by (metric, stage, replica)."""
    prepare_ray(local=True)
    import ray

    with tempfile.TemporaryDirectory(prefix="d", ignore_cleanup_errors=True) as short:
        system = {"metrics_report_interval_ms": 1000 * REPORT_S}
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, _temp_dir=short, _system_config=system, log_to_driver=False
        )
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

        def read() -> dict[tuple[str, str, str], float]:
            with urllib.request.urlopen(url, timeout=10) as reply:
                families = list(text_string_to_metric_families(reply.read().decode()))
            samples = [s for f in families for s in f.samples if s.name.startswith("ray_distill_") and s.labels["run"] == "r"]
            return {(s.name, s.labels["stage"], s.labels.get("replica", "")): s.value for s in samples}

        yield read
        ray.shutdown()


def test_what_is_said_of_a_stage_stands_until_it_ends(scrape: Scrape) -> None:
    exporter = Exporter("r")
    for stage in ("student", "labels"):
        exporter.start(stage)
        exporter.take(stage, {name: 2.0 for name in METRICS if name != names.RUNNING})
    exporter.take("student", {names.LOSS: float("nan"), names.RESTARTS: 1.0, names.LABEL_TOKENS: 0.0})
    exporter.take("baseline", {names.of_replica(names.REPLICA_BUSY_S, 3): 1.5, names.SHARDS_COMMITTED: 1.0})

    def once(condition: Callable[[dict[tuple[str, str, str], float]], bool]) -> dict[tuple[str, str, str], float]:
        """What is scraped when `condition` is true of it, for the first time."""
        deadline = time.monotonic() + 90
        while not condition(found := scrape()):
            assert time.monotonic() < deadline, found
            exporter.refresh()
            time.sleep(REPORT_S / 4)
        return found

    def of(stage: str, found: dict[tuple[str, str, str], float]) -> set[str]:
        return {name for name, its, _ in found if its == stage}

    exported = {m.prometheus_name for m in METRICS.values() if m.exported}
    found = once(lambda found: of("student", found) == of("labels", found) == exported)
    assert found["ray_distill_train_loss", "student", ""] == 2
    assert found["ray_distill_stage_running", "student", ""] == 1
    assert found["ray_distill_train_restarts_total", "student", ""] == 3
    assert abs(time.time() - found["ray_distill_stage_last_progress_time_s", "student", ""]) < 120
    assert {key: value for key, value in found.items() if key[1] == "baseline"} == {
        ("ray_distill_label_replica_busy_s_total", "baseline", "3"): 1.5
    }, "of a stage that is not at work, only what counts"

    exporter.finish("student")
    counters = {m.prometheus_name for m in METRICS.values() if m.kind == "count"}
    found = once(lambda found: of("student", found) == counters)
    assert of("labels", found) == exported, "what stands is set again for as long as Ray takes to forget"
