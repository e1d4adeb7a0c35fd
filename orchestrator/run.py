"""A run: its directory, its lock, its place on Ray, and the books it keeps on its stages."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel

from orchestrator.display import Display
from orchestrator.plan.explain import as_dict
from orchestrator.plan.make import Plan
from orchestrator.runtime.environment import job_tags, tracking_uri
from orchestrator.runtime.session import ray_session
from orchestrator.spec.load import resolved_yaml
from orchestrator.store.files import Store, storage_faults
from orchestrator.store.lock import exclusive
from orchestrator.tracking.mlflow_tracker import Tracker, redact, run_url
from orchestrator.tracking.names import SHARDS_STARTED, metric_of, stage_id
from orchestrator.tracking.spool import Spool

MONITOR_EVERY_S = 0.5
TRACKER_DRAIN_S = 15.0


@dataclass
class StageRecord:
    """What run.json says of a stage."""

    stage: str
    key: str
    started_s: float
    """Seconds since the run began."""
    seconds: float = 0.0
    status: str = "running"
    figures: dict[str, float] = field(default_factory=dict)
    """What the stage measured, for tracking."""

    def reuse(self) -> None:
        """Say that the result was there already."""
        self.status = "reused"


class Run:
    """An open run; made by `open_run` alone."""

    def __init__(self, plan: Plan, display: Display) -> None:
        self.plan, self.job, self.display = plan, plan.job, display
        self.store = Store(plan.storage)
        self.folder = self.store.path(plan.run_key)
        self.started = time.time()
        self.stages: dict[str, StageRecord] = {}
        self.board: Any = None
        self.exporter: Any = None
        self.spool: Spool
        self.tracker: Tracker

    @contextmanager
    def stage(
        self, name: str, key: str, params: Mapping[str, Any] | None = None, dataset: Mapping[str, str] | None = None
    ) -> Generator[StageRecord]:
        """Keep the books on one stage: its time, its fingerprint `key`, whether it ran, was reused, or failed.

        `dataset` (name, digest, source) is what the stage reads, for the lineage.
        """
        record = StageRecord(name, key, started_s=time.time() - self.started)
        self.stages[name] = record
        identity = stage_id(name, key)
        self.tracker.stage_started(identity, flat(params or {}) | {"fingerprint": key}, dataset)
        self.display.stage_started(name)
        self.exporter.start(name)
        try:
            yield record
        except BaseException:
            record.status = "failed"
            raise
        finally:
            record.seconds = time.time() - self.started - record.started_s
            record.status = "ran" if record.status == "running" else record.status
            self.exporter.finish(name)
            self.display.stage_finished(name, record.status, record.seconds)
            self.tracker.stage_finished(identity, "FAILED" if record.status == "failed" else "FINISHED", record.figures)
            self._save()

    def points(self) -> list[dict[str, Any]]:
        """The metric points of this run's stages, times counted from its start."""
        current = {stage_id(r.stage, r.key): r.stage for r in self.stages.values()}
        return [
            {"stage": current[p.stage], "step": p.step, "time_s": p.time_s - self.started, "metrics": p.metrics}
            for p in self.spool.read()
            if p.stage in current
        ]

    def record(self, stage: str, key: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep metrics that the driver itself measured."""
        self._keep([{"stage": stage_id(stage, key), "step": step, "time_s": time.time(), "metrics": dict(metrics)}])

    def shown_job(self) -> str:
        """The resolved job as YAML, without a password that its tracking address may hold."""
        tracking = self.job.tracking
        shown = tracking.model_copy(update={"uri": redact(tracking.uri)}) if tracking.uri else tracking
        return resolved_yaml(self.job.model_copy(update={"tracking": shown}))

    def collect(self) -> None:
        """Take what the workers have put on the board, keep it, and tell the dashboards how things stand."""
        import ray

        from orchestrator.runtime.board import STUDENT_SHARDS

        self._keep(ray.get(self.board.take.remote()))
        started = self.progress().get(f"student.{STUDENT_SHARDS}")
        if started is not None:
            self.exporter.take("student", {SHARDS_STARTED: started})
        self.exporter.refresh()

    def progress(self) -> dict[str, float]:
        """How far the workers say they are."""
        import ray

        return ray.get(self.board.progress.remote())

    def _keep(self, points: list[dict[str, Any]]) -> None:
        for point in points:
            stage = point["stage"].partition(":")[0]
            self.exporter.take(stage, point["metrics"])
            logged = {name: value for name, value in point["metrics"].items() if metric_of(name)[0].logged}
            if logged:
                with storage_faults(self.spool.path):
                    self.spool.append(point["stage"], point["step"], logged, point["time_s"])
                self.display.point(stage, point["step"], logged)
        if points:
            self.tracker.notify()

    def _save(self) -> None:
        document = {"name": self.job.name, "stages": {name: asdict(record) for name, record in self.stages.items()}}
        self.store.replace(f"{self.plan.run_key}/run.json", json.dumps(document, indent=1).encode())


@contextmanager
def open_run(plan: Plan, display: Display) -> Iterator[Run]:
    """A run directory that is ours alone, on a Ray that is up.

    Raises `EnvironmentFault` for a storage that cannot be written and `LockedError` if the run is going on elsewhere.
    """
    run = Run(plan, display)
    run.store.check_writable()
    with ExitStack() as stack:
        stack.enter_context(exclusive(run.folder / "lock"))
        run.store.replace(f"{plan.run_key}/job.yaml", resolved_yaml(plan.job).encode(), private=True)
        run.store.replace(f"{plan.run_key}/plan.json", json.dumps(as_dict(plan), indent=1).encode(), private=True)
        run.spool = Spool(run.folder / "metrics.jsonl")
        run.tracker, address = _tracker(run)
        where = f"run {run.folder}  mlflow {address}"
        stack.enter_context(display.open(where, plan))
        stack.callback(_close_tracker, run)
        stack.enter_context(ray_session(plan.job.cluster, plan.cpu_slots))
        from orchestrator.monitoring.exporter import Exporter
        from orchestrator.runtime.board import start_board

        run.board, run.exporter = start_board(), Exporter(plan.job.name)
        stack.enter_context(_monitor(run))
        yield run


def _tracker(run: Run) -> tuple[Tracker, str]:
    tracking = run.job.tracking
    uri = tracking.uri or tracking_uri() or f"sqlite:///{run.store.root / 'mlflow.db'}"
    own = uri.startswith("sqlite:")
    tracker = Tracker(
        uri=uri,
        experiment=tracking.experiment,
        run_name=run.job.name,
        spool_path=run.spool.path,
        state_path=run.folder / "tracking.json",
        tags={"run_directory": str(run.folder), "seed": str(run.job.seed), **job_tags()},
        artifact_location=(run.store.root / "mlartifacts").as_uri() if own else None,
        warn=run.display.say,
        enabled=tracking.enabled,
    )
    tracker.start()
    return tracker, run_url(uri) if tracking.enabled else "off"


def _close_tracker(run: Run) -> None:
    failed = any(record.status == "failed" for record in run.stages.values())
    run.tracker.close("FAILED" if failed else "FINISHED", TRACKER_DRAIN_S)


@contextmanager
def _monitor(run: Run) -> Iterator[None]:
    """Collect from the board in the background, and once more at the end."""
    stop = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        try:
            while not stop.wait(MONITOR_EVERY_S):
                run.collect()
        except Exception as error:
            failures.append(error)
            run.board.abort.remote(str(error))

    thread = threading.Thread(target=watch, name="monitor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if failures:
            raise failures[0]
        run.collect()


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted names."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
