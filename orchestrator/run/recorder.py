"""An open run: its lock, its place on Ray, and the record it keeps of its stages."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.display import Display
from orchestrator.errors import EnvironmentFault, Terminated, find_user_error, one_line
from orchestrator.plan.explain import as_dict
from orchestrator.plan.make import Plan
from orchestrator.run.directory import RUN, claim_directory
from orchestrator.run.record import Fault, RunStatus, StageRecord, ended_by
from orchestrator.run.tracking import NOTE, description, final_figures, start_tracker, without_password
from orchestrator.runtime.session import ray_session
from orchestrator.runtime.signals import signals_heeded
from orchestrator.spec.load import resolved_yaml
from orchestrator.store.files import StillOurs, open_store, storage_faults
from orchestrator.tracking.mlflow_tracker import PARENT, Status, Tracker
from orchestrator.tracking.names import SHARDS_STARTED, metric_of, stage_id
from orchestrator.tracking.spool import Spool
from orchestrator.tracking.system import system_metrics

log = logging.getLogger(__name__)
METRICS, OUTBOX = "metrics.jsonl", "tracking.json"
"""Files of the run directory that are written on and on."""
MONITOR_EVERY_S = 0.5
ANSWER_S = 300.0
"""The board answers within milliseconds, or is gone."""
TRACKER_DRAIN_S = 15.0
CLOSE_S = 30.0
"""How long a run that failed or was stopped waits for a cluster that may be gone."""
TRACKED: Mapping[str, Status] = {
    **dict.fromkeys(("finished", "ran", "reused"), "FINISHED"),
    "stopped": "KILLED",
    "failed": "FAILED",
}
"""MLflow's words for how a run or a stage ended."""


class Run:
    """An open run; made by `open_run` alone."""

    def __init__(self, plan: Plan, display: Display) -> None:
        self.plan, self.job, self.display = plan, plan.job, display
        self.store = open_store(plan.storage)
        self.store.check_writable()
        self.directory = claim_directory(self.store, plan.job)
        self.folder: Path
        """The run directory, or where this process works on what of it is appended to."""
        self.still_ours: StillOurs
        self.started = time.time()
        self.first_started = self.started
        """The Unix time at which the first attempt began."""
        self.seconds_before = 0.0
        """The seconds that earlier attempts took."""
        self.stages: dict[str, StageRecord] = {}
        self._going: dict[str, StageRecord] = {}
        """Stages that have not ended."""
        self.attempt = 1
        self.status: RunStatus = "running"
        self.faults: list[Fault] = []
        """Of this attempt and of those before it that did not finish."""
        self._mutex, self._collecting = threading.Lock(), threading.Lock()
        self.board: Any = None
        self.exporter: Any = None
        self.spool: Spool
        self.tracker: Tracker

    @contextmanager
    def stage(self, name: str, key: str, dataset: Mapping[str, str] | None = None) -> Generator[StageRecord]:
        """Record one stage: its time, its fingerprint `key`, whether it ran, was reused, was stopped, or failed.

        `dataset` (name, digest, source) is what the stage reads, for the lineage.
        """
        record = StageRecord(name, key, started_s=time.time() - self.started)
        with self._mutex:
            self.stages[name] = self._going[name] = record
        self.tracker.stage_started(stage_id(name, key), {"fingerprint": key}, dataset)
        if dataset is not None:
            self.tracker.dataset(dataset)
        self.display.stage_started(name)
        log.debug("%s begins, key %s", name, key)
        self.exporter.start(name)
        try:
            yield record
        except BaseException as error:
            self._end_stage(record, ended_by(error))
            raise
        else:
            self._end_stage(record, "ran")

    def _end_stage(self, record: StageRecord, status: Literal["ran", "stopped", "failed"]) -> None:
        with self._mutex:
            if self._going.pop(record.stage, None) is None:
                return  # the run ended before it did
            record.end(status, time.time() - self.started - record.started_s)
        self.exporter.finish(record.stage)
        self.display.stage_finished(record.stage, record.status, record.seconds, record.figures)
        log.debug("%s %s after %.1f s: %s", record.stage, record.status, record.seconds, record.figures)
        self.tracker.stage_finished(stage_id(record.stage, record.key), TRACKED[record.status], record.figures)
        self.save()

    def end(self, error: BaseException) -> None:
        """Say at once, before anything is closed, that `error` ended the run, and that with it the stages stopped."""
        if self.status != "running":
            return
        self.status = ended_by(error)
        for record in list(self._going.values()):
            self._end_stage(record, "stopped")
        self.tracker.end(TRACKED[self.status])

    def conclude(self, report: Mapping[str, Any], verdict: str) -> None:
        """Tell MLflow the figures of the finished run, and in words what came of it."""
        self.tracker.summary(final_figures(report))
        self.tracker.tags({NOTE: f"{description(self.job)}\n\n{verdict}"})

    def warn(self, text: str) -> None:
        """Say what went wrong and was got over, and keep it for the report."""
        self.display.warn(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Keep a fault."""
        with self._mutex:
            self.faults.append(Fault(self.attempt, time.time() - self.started, one_line(text)))
        self.save()

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
        return resolved_yaml(without_password(self.job))

    def collect(self) -> None:
        """Take what the workers have put on the board, keep it, and tell the dashboards how things stand."""
        import ray

        from orchestrator.runtime.board import STUDENT_SHARDS

        with self._collecting:  # points of one call are kept before those of the next
            points, warnings = ray.get([self.board.take.remote(), self.board.take_warnings.remote()], timeout=ANSWER_S)
            self._keep(points)
        for text in warnings:
            self.warn(text)
        started = self.progress().get(f"student.{STUDENT_SHARDS}")
        if started is not None:
            self.exporter.take("student", {SHARDS_STARTED: started})
        self.exporter.refresh()

    def progress(self) -> dict[str, float]:
        """Return the progress that the workers have reported."""
        import ray

        return ray.get(self.board.progress.remote(), timeout=ANSWER_S)

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

    def save(self) -> None:
        """Write run.json."""
        with self._mutex:
            now = time.time()
            document = self.directory.model_dump() | {
                "run": self.directory.run,
                "status": self.status,
                "started_s": self.first_started,
                "ended_s": None if self.status == "running" else now,
                "seconds": self.seconds_before + now - self.started,
                "attempt": self.attempt,
                "stages": {name: asdict(record) for name, record in self.stages.items()},
                "faults": [asdict(fault) for fault in self.faults],
            }
            self.store.replace(f"{self.directory.key}/{RUN}", json.dumps(document, indent=1).encode())


@contextmanager
def open_run(plan: Plan, display: Display) -> Iterator[Run]:
    """A run directory that is ours alone, on a Ray that is up.

    Raises `EnvironmentFault` for a storage that cannot be written and `LockedError` if the run is going on elsewhere.
    """
    run = Run(plan, display)
    key = run.directory.key
    with ExitStack() as stack:
        stack.enter_context(signals_heeded())
        run.still_ours = stack.enter_context(run.store.exclusive(f"{key}/lock"))
        stack.enter_context(_attempt(run))
        run.folder = stack.enter_context(run.store.workspace(key, (METRICS, OUTBOX), run.still_ours))
        run.store.replace(f"{key}/job.yaml", run.shown_job().encode(), private=True)
        shown = as_dict(replace(plan, job=without_password(plan.job))) | {"run_directory": run.store.address(key)}
        run.store.replace(f"{key}/plan.json", json.dumps(shown, indent=1).encode(), private=True)
        run.spool = Spool(run.folder / METRICS)
        run.tracker, address = start_tracker(run, run.folder / OUTBOX)
        where = f"run {run.store.address(key)}  tracking: {address}"
        stack.enter_context(display.open(where, plan))
        stack.enter_context(_tracked_to_the_end(run))
        if plan.job.tracking.enabled:
            stack.enter_context(system_metrics(run.spool, PARENT, run.first_started))
        display.say("starting Ray" if plan.job.cluster.address == "local" else f"joining Ray at {plan.job.cluster.address}")
        stack.enter_context(ray_session(plan.job.cluster, plan.cpu_slots))
        from orchestrator.monitoring.exporter import Exporter
        from orchestrator.runtime.board import start_board

        run.board, run.exporter = start_board(), Exporter(run.directory.run)
        stack.enter_context(_monitor(run))
        stack.enter_context(_told_at_once(run))
        yield run


@contextmanager
def _attempt(run: Run) -> Iterator[None]:
    """Go on with the faults of an attempt that did not finish, and say at the end how this one did."""
    before: dict[str, Any] = run.store.read_json(f"{run.directory.key}/{RUN}") or {}
    run.first_started = before.get("started_s", run.started)
    run.seconds_before = before.get("seconds", 0.0)
    if before.get("status") in ("running", "stopped", "failed"):
        run.attempt = before["attempt"] + 1
        run.faults = [Fault(**fault) for fault in before["faults"]]
        if before["status"] == "running":
            run.note(f"attempt {before['attempt']} was killed, or its machine was lost; going on from what was committed")
    run.save()
    try:
        yield
        run.status = "finished"
    except BaseException as error:
        if run.status != "finished":  # a stop while MLflow takes the rest stops nothing else
            run.status = ended_by(error)
        stopped = "stopped by SIGTERM" if isinstance(error, Terminated) else "stopped by Ctrl-C"
        unforeseen = stopped if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}".rstrip(": ")
        reason = str(find_user_error(error) or unforeseen)
        run.note(one_line(f"attempt {run.attempt} ended: {reason}"))
        raise
    finally:
        run.save()


@contextmanager
def _tracked_to_the_end(run: Run) -> Iterator[None]:
    """Tell MLflow how the run ended, and give it `TRACKER_DRAIN_S` to take everything."""
    try:
        with _told_at_once(run):
            yield
        run.status = "finished"
    finally:
        run.tracker.close(TRACKED[run.status], TRACKER_DRAIN_S)


@contextmanager
def _told_at_once(run: Run) -> Iterator[None]:
    """Tell MLflow of a failure or a stop before Ray is shut down: whoever stops a run may kill it seconds later."""
    try:
        yield
    except BaseException as error:
        with suppress(EnvironmentFault):  # of a storage that fails now, too; what ended the run is to be known
            run.end(error)
        raise


@contextmanager
def _monitor(run: Run) -> Iterator[None]:
    """Collect from the board in the background, and once more at the end."""
    stop = threading.Event()
    failures: list[Exception] = []

    def watch() -> None:
        try:
            while not stop.wait(MONITOR_EVERY_S):
                run.still_ours()
                run.collect()
        except Exception as error:
            failures.append(error)
            run.board.abort.remote(str(error))

    thread = threading.Thread(target=watch, name="monitor", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        stop.set()
        thread.join(CLOSE_S)
        if failures and ended_by(error) == "failed":
            raise failures[0] from error
        with suppress(Exception):  # what ended the run is to be known, not what followed from it
            run.collect()
        raise
    stop.set()
    thread.join()
    if failures:
        raise failures[0]
    run.collect()
