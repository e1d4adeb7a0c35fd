"""Opening and closing of a run: its lock, its record, the places that follow it, and Ray."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from orchestrator.display import Display
from orchestrator.errors import EnvironmentFault
from orchestrator.plan.explain import as_dict
from orchestrator.plan.make import Plan
from orchestrator.run.directory import claim_directory
from orchestrator.run.place import Place
from orchestrator.run.record import RunRecord, ended_by
from orchestrator.run.recorder import Recorder, Run
from orchestrator.run.sinks import TRACKED, Exported, Shown, Tracked
from orchestrator.run.tracking import start_tracker, without_password
from orchestrator.runtime.session import ray_session
from orchestrator.runtime.signals import signals_heeded
from orchestrator.spec.load import resolved_yaml
from orchestrator.store.files import Store, open_store
from orchestrator.tracking.mlflow_tracker import PARENT
from orchestrator.tracking.spool import Spool
from orchestrator.tracking.system import system_metrics

METRICS, OUTBOX = "metrics.jsonl", "tracking.json"
"""Files of the run directory that are written on and on."""
MONITOR_EVERY_S = 0.5
TRACKER_DRAIN_S = 15.0
CLOSE_S = 30.0
"""Seconds that a failed or stopped run waits for a cluster that may be gone."""


@contextmanager
def open_run(plan: Plan, display: Display) -> Iterator[Run]:
    """A run directory that is ours alone, on a Ray that is up.

    Raises `EnvironmentFault` for a storage that cannot be written and `LockedError` if the run is going on elsewhere.
    """
    store = open_store(plan.storage)
    store.check_writable()
    directory = claim_directory(store, plan.job)
    record, key, address = RunRecord(store, directory), directory.key, plan.job.cluster.address
    with ExitStack() as stack:
        stack.enter_context(signals_heeded())
        still_ours = stack.enter_context(store.exclusive(f"{key}/lock"))
        stack.enter_context(record.kept())
        folder = stack.enter_context(store.workspace(key, (METRICS, OUTBOX), still_ours))
        place = Place(store, directory, folder, still_ours)
        _write_job(store, key, plan)
        spool = Spool(folder / METRICS)

        def warn(text: str) -> None:
            display.warn(text)
            record.note(text)

        tracker, shown_at = start_tracker(plan.job, place, spool.path, folder / OUTBOX, warn)
        recorder = Recorder(record, display, tracker, [Shown(display), Tracked(spool, tracker)])
        stack.enter_context(display.open(f"run {store.address(key)}  tracking: {shown_at}", plan))
        stack.enter_context(_tracked_to_the_end(recorder))
        if plan.job.tracking.enabled:
            stack.enter_context(system_metrics(spool, PARENT, record.first_started))
        display.say("starting Ray" if address == "local" else f"joining Ray at {address}")
        stack.enter_context(ray_session(plan.job.cluster, plan.cpu_slots))
        from orchestrator.monitoring.exporter import Exporter
        from orchestrator.runtime.board import start_board

        recorder.sinks.append(Exported(Exporter(directory.run)))
        run = Run(plan, place, recorder, spool, start_board())
        stack.enter_context(_monitor(run))
        stack.enter_context(_told_at_once(recorder))
        yield run


def _write_job(store: Store, key: str, plan: Plan) -> None:
    """Write what was asked for, and the plan, for their owner's eyes alone."""
    job = without_password(plan.job)
    store.replace(f"{key}/job.yaml", resolved_yaml(job).encode(), private=True)
    shown = as_dict(replace(plan, job=job)) | {"run_directory": store.address(key)}
    store.replace(f"{key}/plan.json", json.dumps(shown, indent=1).encode(), private=True)


@contextmanager
def _tracked_to_the_end(recorder: Recorder) -> Iterator[None]:
    """Tell MLflow how the run ended, and give it `TRACKER_DRAIN_S` to take everything."""
    try:
        with _told_at_once(recorder):
            yield
        recorder.record.status = "finished"
    finally:
        recorder.tracker.close(TRACKED[recorder.record.status], TRACKER_DRAIN_S)


@contextmanager
def _told_at_once(recorder: Recorder) -> Iterator[None]:
    """Tell MLflow of a failure or a stop before Ray is shut down: whoever stops a run may kill it seconds later."""
    try:
        yield
    except BaseException as error:
        with suppress(EnvironmentFault):  # of a storage that fails now, too; what ended the run is to be known
            recorder.end(error)
        raise


@contextmanager
def _monitor(run: Run) -> Iterator[None]:
    """Collect from the board in the background, and once more at the end."""
    from orchestrator.runtime.leaving import LeavingNodes

    stop, leaving = threading.Event(), LeavingNodes()
    failures: list[Exception] = []

    def watch() -> None:
        try:
            while not stop.wait(MONITOR_EVERY_S):
                run.still_ours()
                run.collect()
                leaving.save_checkpoints(run.board, run.warn)
        except Exception as error:
            failures.append(error)
            run.abort(str(error))

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
