"""The run's record in MLflow, kept by one background thread so that MLflow can cost a warning but never the run.

Everything to be recorded is on disk before MLflow hears of it: points in the log, all else as commands in the outbox.
The thread carries both over in the order in which they were given; what it could not carry, the next run of the same
job (or `Tracker.replay`) does. Every delivery may be repeated without effect, so a lost reply does no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Callable, Mapping
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from orchestrator.errors import one_line
from orchestrator.tracking.names import HEADLINES
from orchestrator.tracking.spool import Command, Courier, Outbox, Point

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
Row = tuple[str, float, int, int]
"""A metric's name, value, Unix time in ms, step."""
PARENT = "run"
"""Key of the parent run's id among the ids of the stages."""

_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE_CHARS, _MAX_DIGEST_CHARS = 1000, 100, 6000, 36
_MAX_TRIES = 3
_TIMED = ("status", "summary")


class Tracker:
    """Records a job run as an MLflow parent run with one child run per stage.

    No method raises or waits for MLflow, except that `close` and `replay` wait up to their timeout. `warn` is called
    once for a server in trouble and once for each item that MLflow will not take, mostly from the background thread.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        spool_path: Path,
        state_path: Path,
        tags: Mapping[str, str],
        *,
        warn: Callable[[str], None],
        artifact_location: str | None = None,
        http_timeout_s: int = 10,
        enabled: bool = True,
    ) -> None:
        self._uri, self._run_name, self._tags, self._enabled = uri, run_name, dict(tags), enabled
        self._spool_path, self._warn, self._warned = spool_path, warn, False
        self._outbox = Outbox(state_path, spool_path)
        self._connect = lambda: _Session(uri, experiment, artifact_location, http_timeout_s)
        self._session: _Session | None = None
        self._last_steps: dict[str, dict[str, int]] = {}
        self._tries: dict[str, int] = {}
        self._courier = Courier(self._outbox, self._send, self._in_trouble)

    @property
    def run_ids(self) -> dict[str, str]:
        """MLflow run ids by stage, the parent's under `PARENT`; those known so far."""
        return self._outbox.runs

    @property
    def address(self) -> str:
        """Return where a person looks at this run, as far as it is known yet."""
        return run_url(self._uri, self._outbox.experiment_id, self.run_ids.get(PARENT))

    def start(self) -> None:
        """Open the parent run, or the one of an earlier attempt again."""
        self._put(("status", PARENT, {"status": "RUNNING"}), ("tags", PARENT, {"tags": _clipped(self._tags)}))
        if self._enabled:
            self._courier.start()

    def stage_started(self, stage: str, params: Mapping[str, Any], dataset: Mapping[str, str] | None = None) -> None:
        """Open the stage's child run; `dataset` has `name`, `digest` and `source`."""
        assert stage != PARENT
        inputs = [("dataset", stage, dict(dataset))] if dataset else []
        self._put(("status", stage, {"status": "RUNNING"}), ("params", stage, {"params": _clipped(params)}), *inputs)

    def stage_finished(self, stage: str, status: Status, metrics: Mapping[str, float]) -> None:
        """End the stage's run, with its finite closing `metrics` at step 0."""
        self._put(("summary", stage, {"metrics": _finite(metrics)}), ("status", stage, {"status": status}))

    def params(self, params: Mapping[str, Any]) -> None:
        """Set parameters of the parent run."""
        self._put(("params", PARENT, {"params": _clipped(params)}))

    def dataset(self, dataset: Mapping[str, str]) -> None:
        """Say what the run as a whole reads: `name`, `digest` and `source`."""
        self._put(("dataset", PARENT, dict(dataset)))

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Set the closing metrics of the parent run, at step 0."""
        self._put(("summary", PARENT, {"metrics": _finite(metrics)}))

    def text(self, name: str, text: str) -> None:
        """Keep `text` as the file `name` of the parent run."""
        self._put(("text", PARENT, {"name": name, "text": text}))

    def artifact(self, path: Path, stage: str | None = None) -> None:
        """Upload a file or folder to the stage's run, or the parent; it is read when it is sent."""
        self._put(("artifact", stage or PARENT, {"path": str(path.absolute())}))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the parent run."""
        self._put(("tags", PARENT, {"tags": _clipped(tags)}))

    def notify(self) -> None:
        """Say that the log has new points; without it they are noticed a little later."""
        self._courier.wake()

    def end(self, status: Status) -> None:
        """End the parent run, and as KILLED each child that an earlier attempt left running."""
        children = [stage for stage in self.run_ids if stage != PARENT]
        self._put(*(("abandoned", stage, {}) for stage in children), ("status", PARENT, {"status": status}))

    def close(self, status: Status | None, timeout_s: float) -> bool:
        """`end`, where there is a `status`, and wait for everything to be sent; False if something is left for the next run."""
        if status:
            self.end(status)
        return self._courier.finish(timeout_s)

    def replay(self, timeout_s: float) -> bool:
        """Instead of `start` and `close`: send what earlier runs left over; False if something is still left."""
        if self._enabled:
            self._courier.start()
        return self.close(None, timeout_s)

    def _put(self, *commands: tuple[str, str, dict[str, Any]]) -> None:
        if not self._enabled:
            return
        try:
            self._outbox.put(*commands)
        except Exception as error:
            self._warn_once(error)
        self._courier.wake()

    # Everything below runs in the courier's thread.

    def _send(self, item: Command | list[Point]) -> None:
        if isinstance(item, Command):
            self._send_command(item)
        else:
            self._send_points(item)
        self._tries.clear()

    def _in_trouble(self, error: Exception) -> None:
        self._last_steps.clear()  # a request without a reply may have been carried out: ask again
        self._warn_once(error)

    def _send_points(self, points: list[Point]) -> None:
        for stage, group in groupby(sorted(points, key=lambda p: p.stage), key=lambda p: p.stage):
            rows = [(name, v, int(p.time_s * 1000), p.step) for p in group for name, v in p.metrics.items()]
            self._send_rows(stage, rows)
            name_of = stage.partition(":")[0]
            headlines = [(f"{name_of}/{row[0]}", *row[1:]) for row in rows if f"{name_of}/{row[0]}" in HEADLINES]
            if headlines:
                self._send_rows(PARENT, headlines)

    def _send_rows(self, stage: str, rows: list[Row]) -> None:
        session, run_id = self._open(stage, start_ms=rows[0][2])
        last = self._last_steps[stage]
        new = [row for row in rows if row[3] > last.get(row[0], -1)]
        self._attempt(session, f"metrics of {stage}", lambda: session.metrics(run_id, new))

    def _send_command(self, command: Command) -> None:
        session, run_id = self._open(command.stage, command.time_ms)
        send = getattr(session, command.kind)
        args = command.args | ({"time_ms": command.time_ms} if command.kind in _TIMED else {})
        self._attempt(session, f"{command.kind} of {command.stage}", lambda: send(run_id, **args))

    def _attempt(self, session: _Session, what: str, send: Callable[[], None]) -> None:
        """Give up `send`, with a warning, if it keeps failing on a server that otherwise works: others wait behind it."""
        try:
            send()
        except Exception as error:
            session.ping()
            self._tries[what] = self._tries.get(what, 0) + 1
            if self._tries[what] < _MAX_TRIES:
                raise
            if self._tries[what] == _MAX_TRIES:
                self._warn(f"MLflow does not take the {what}: {_brief(error)}; left out")

    def _open(self, stage: str, start_ms: int) -> tuple[_Session, str]:
        """The stage's run: the stored one, else one that was made without our hearing of it, else a new one."""
        session = self._session = self._session or self._connect()
        run_id = self._outbox.runs.get(stage)
        if run_id and stage in self._last_steps:
            return session, run_id
        parent = None if stage == PARENT else self._open(PARENT, start_ms)[1]
        if run_id is None:
            key, name = f"{self._outbox.key}/{stage}", self._run_name if parent is None else f"{self._run_name}/{stage}"
            run_id = session.find(key) or session.create(name, key, parent, start_ms)
            self._outbox.set_run(stage, run_id, session.experiment_id)
        last_steps = session.last_steps(run_id)
        if last_steps is None:
            self._outbox.forget_run(stage)
            raise LookupError(f"run {run_id} is gone, recording anew")
        self._last_steps[stage] = last_steps
        return session, run_id

    def _warn_once(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            where = f"MLflow at {redact(self._uri)}: {_brief(error)}"
            self._warn(f"{where}; the run goes on, {self._spool_path} keeps the metrics until they are sent")


class _Session:
    """A connection to one experiment. Every method may raise whatever MLflow raises, and may be repeated."""

    def __init__(self, uri: str, experiment: str, artifact_location: str | None, http_timeout_s: int) -> None:
        from mlflow import MlflowClient, entities
        from mlflow import environment_variables as env
        from mlflow.telemetry import set_telemetry_client

        for variable, value in (
            (env.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),  # the default blocks for four minutes; our loop retries itself
            (env.MLFLOW_HTTP_REQUEST_TIMEOUT, http_timeout_s),
            (env.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
            (env.MLFLOW_DISABLE_TELEMETRY, True),
        ):
            if not variable.is_set():
                variable.set(value)
        set_telemetry_client()
        if not env.MLFLOW_LOGGING_LEVEL.is_set():
            logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._entities, self._client = entities, MlflowClient(uri)
        self.experiment_id = self._experiment(experiment, artifact_location)

    def _experiment(self, name: str, artifact_location: str | None) -> str:
        """Its id; made if there is none, unless another run makes it at the same moment."""
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._experiment(name, artifact_location)

    def ping(self) -> None:
        self._client.get_experiment(self.experiment_id)

    def find(self, key: str) -> str | None:
        runs = self._client.search_runs([self.experiment_id], f"tags.`distill.key` = '{key}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def create(self, name: str, key: str, parent: str | None, start_ms: int) -> str:
        tags = {"distill.key": key} | ({"mlflow.parentRunId": parent} if parent else {})
        return self._client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=name).info.run_id

    def last_steps(self, run_id: str) -> dict[str, int] | None:
        """The highest step of each metric of the run; None if there is no such run."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return None if run.info.lifecycle_stage == "deleted" else {m.key: m.step for m in run.data.to_proto().metrics}

    def metrics(self, run_id: str, rows: list[Row]) -> None:
        self._log(run_id, metrics=[self._entities.Metric(*row) for row in rows])

    def summary(self, run_id: str, metrics: dict[str, float], time_ms: int) -> None:
        self.metrics(run_id, [(name, value, time_ms, 0) for name, value in metrics.items()])

    def params(self, run_id: str, params: dict[str, str]) -> None:
        """Log new parameters; MLflow keeps a parameter's first value, so that a later one becomes a tag."""
        data = self._client.get_run(run_id).data
        self._log(run_id, params=[self._entities.Param(*item) for item in params.items() if item[0] not in data.params])
        renamed = {f"param_changed.{key}": (value, data.params.get(key, value)) for key, value in params.items()}
        self.tags(run_id, {tag: now for tag, (now, first) in renamed.items() if now != first or tag in data.tags})

    def tags(self, run_id: str, tags: dict[str, str]) -> None:
        self._log(run_id, tags=[self._entities.RunTag(*item) for item in tags.items()])

    def _log(self, run_id: str, **entities: list[Any]) -> None:
        for kind, items in entities.items():
            size = _MAX_METRICS if kind == "metrics" else _MAX_PARAMS
            for i in range(0, len(items), size):
                self._client.log_batch(run_id, **{kind: items[i : i + size]})  # pyright: ignore[reportArgumentType]

    def dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        where = json.dumps({"uri": source})
        dataset = self._entities.Dataset(name, digest[:_MAX_DIGEST_CHARS], source_type="local", source=where)
        self._client.log_inputs(run_id, [self._entities.DatasetInput(dataset)])

    def artifact(self, run_id: str, path: str) -> None:
        if Path(path).is_dir():
            self._client.log_artifacts(run_id, path, Path(path).name)
        else:
            self._client.log_artifact(run_id, path)

    def text(self, run_id: str, name: str, text: str) -> None:
        self._client.log_text(run_id, text, name)

    def abandoned(self, run_id: str) -> None:
        """End a run that nobody is going to end."""
        if self._client.get_run(run_id).info.status == "RUNNING":
            self._client.set_terminated(run_id, "KILLED")

    def status(self, run_id: str, status: Status, time_ms: int) -> None:
        if status == "RUNNING":
            self._client.update_run(run_id, status)
        else:
            self._client.set_terminated(run_id, status, time_ms)


def redact(text: str) -> str:
    """`text` without the credentials that URIs in it carry."""
    text = re.sub(r"://[^\s/?#]*@", "://***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:pass|pwd|token|secret|key)[^=&\s]*=)[^&\s'\"]+", r"\1***", text)


def run_url(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """Return where a person looks at the run: its page on a server, or the command that serves a local database."""
    if not uri.startswith(("http://", "https://")):
        return f"mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"
    page = f"/#/experiments/{experiment_id}" + (f"/runs/{run_id}" if run_id else "") if experiment_id else ""
    return redact(uri.rstrip("/")) + page


def sqlite_uri(path: Path) -> str:
    """The address of the SQLite database in the file `path`.

    Escaped is only what would mean something else: MLflow makes a stray folder of the name as it stands in the address.
    """
    return "sqlite:///" + re.sub("[%?]", lambda found: quote(found[0]), str(path))


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isfinite(value)}


def _clipped(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as text that MLflow takes; a longer one ends in the hash of the whole."""
    texts = {str(key): str(value) for key, value in values.items()}
    for key, text in texts.items():
        if len(text) > _MAX_VALUE_CHARS:
            end = f"… sha256:{hashlib.sha256(text.encode()).hexdigest()}"
            texts[key] = text[: _MAX_VALUE_CHARS - len(end)] + end
    return texts


def _brief(error: Exception) -> str:
    return one_line(redact(str(error)))[:200] or type(error).__name__
