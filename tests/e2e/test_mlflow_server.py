"""The MLflow server of a team, as `cluster/mlflow/compose.yaml` has it: on PostgreSQL and S3, with users, through failures."""

from __future__ import annotations

import base64
import configparser
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from orchestrator.tracking.mlflow_tracker import PARENT, Tracker
from orchestrator.tracking.names import LOSS
from tests.clusters import cluster
from tests.e2e.mlflow_runs import (
    PATIENCE_S,
    Run,
    Server,
    assert_recorded_once,
    client,
    eventually,
    free_port,
    history,
    recorded_runs,
)
from tests.e2e.team import BUCKET, MLFLOW, ROOT, SECRETS, Postgres, TeamServer, sign_in
from tests.s3 import BUCKET as STORAGE_BUCKET
from tests.s3 import Server as Storage
from tests.tiny import (
    DISTILL,
    LABELLER,
    Reference,
    assert_every_row_labelled_once,
    metric_points,
    started,
    student_weights,
    write_job,
)

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    postgres = Postgres()
    try:
        postgres.start()
        postgres.query("CREATE DATABASE mlflow", database="postgres")  # as the image does for POSTGRES_USER
        postgres.query((MLFLOW / "databases.sql").read_text(), database="postgres")
        yield postgres
    finally:
        postgres.kill()
        shutil.rmtree(postgres.folder)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of an S3 server in a process of its own, with one bucket."""
    import boto3

    port = free_port()
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    keys = {"aws_access_key_id": "team", "aws_secret_access_key": SECRETS["AWS_SECRET_ACCESS_KEY"]}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **keys)

    def has_bucket() -> bool:
        try:
            return bool(client.create_bucket(Bucket=BUCKET))
        except Exception:
            return False

    try:
        eventually(has_bucket)
        yield client
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, s3: Any) -> Iterator[TeamServer]:
    server = TeamServer(tmp_path_factory.mktemp("server"), postgres, s3.meta.endpoint_url)
    server.start()
    try:
        server.wait()
        with pytest.MonkeyPatch.context() as patch:
            from mlflow.server.auth.client import AuthServiceClient

            sign_in(patch, "admin", SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"])
            for user in ("alice", "bob"):
                AuthServiceClient(server.uri).create_user(user, SECRETS["USER"])
        yield server
    finally:
        server.kill()


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch) -> None:
    sign_in(monkeypatch, "alice", SECRETS["USER"])


class PatientRun(Run):
    """Its trackers wait long for a reply: that a busy machine is slow must not look like trouble."""

    def tracker(self, uri: str, **options: Any) -> Tracker:
        return super().tracker(uri, artifact_location=None, http_timeout_s=int(PATIENCE_S), **options)


@pytest.fixture
def run(tmp_path: Path) -> PatientRun:
    return PatientRun(tmp_path)


def status(server: Server, credentials: str = "", **headers: str) -> int:
    """HTTP status of a request for the experiments."""
    address = f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    if credentials:
        headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_who_is_known_gets_in_and_only_by_the_servers_name(server: TeamServer) -> None:
    known = f"alice:{SECRETS['USER']}"
    assert status(server, known) == 200
    assert status(server) == status(server, "alice:guess") == status(server, "nobody:guess") == 401
    assert status(server, known, Host="evil.example.com") == 403


TEAM_RUN = """
import sys
from pathlib import Path
from orchestrator.tracking.mlflow_tracker import Tracker
from orchestrator.tracking.names import LOSS
from orchestrator.tracking.spool import Spool
folder, uri = Path(sys.argv[1]), sys.argv[2]
spool = Spool(folder / "metrics.jsonl")
where = (spool.path, folder / "tracking.json")
tracker = Tracker(uri, "team", folder.name, *where, {"user": folder.name}, warn=print, http_timeout_s=120)
tracker.start()
tracker.stage_started("student", {"owner": folder.name})
for step in range(1500):
    spool.append("student", step, {LOSS: 9.0 / (step + 1)}, 1.7e9 + step)
tracker.artifact(folder / "report.html", "student")
tracker.stage_finished("student", "FINISHED", {})
sys.exit(not tracker.close("FINISHED", 120.0))
"""


def test_runs_of_two_users_at_once_lie_in_postgresql_and_s3(
    server: TeamServer, postgres: Postgres, s3: Any, tmp_path: Path, alice: None
) -> None:
    started = []
    for user in ("alice", "bob"):
        (tmp_path / user).mkdir()
        (tmp_path / user / "report.html").write_text(f"<html>{user}'s")
        environment = os.environ | {"MLFLOW_TRACKING_USERNAME": user, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-c", TEAM_RUN, str(tmp_path / user), server.uri]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    ended = [(process.communicate(timeout=PATIENCE_S)[0], process.returncode) for process in started]
    assert ended == [("", 0), ("", 0)]

    runs = {
        r.info.run_name: r
        for r in client(server.uri).search_runs([client(server.uri).get_experiment_by_name("team").experiment_id])
    }
    assert set(runs) == {"alice", "bob", "alice/student", "bob/student"}
    for user in ("alice", "bob"):
        run, parent = runs[f"{user}/student"], runs[user]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and parent.data.tags["user"] == user
        assert history(server.uri, run.info.run_id, LOSS) == [(step, 9.0 / (step + 1)) for step in range(1500)]
        downloaded = client(server.uri).download_artifacts(run.info.run_id, "report.html", str(tmp_path))
        assert Path(downloaded).read_text() == f"<html>{user}'s"

        kept = postgres.query("SELECT name, status FROM runs WHERE run_uuid = %s", run.info.run_id)
        assert kept == [(f"{user}/student", "FINISHED")]
        values = postgres.query("SELECT step, value FROM metrics WHERE run_uuid = %s ORDER BY step", run.info.run_id)
        assert values == [(step, 9.0 / (step + 1)) for step in range(1500)]
        (key,) = [o["Key"] for o in s3.list_objects_v2(Bucket=BUCKET)["Contents"] if run.info.run_id in o["Key"]]
        assert key.startswith("mlflow/") and s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode() == f"<html>{user}'s"
    assert {p.name for p in server._folder.iterdir()} == {"server.log"}, "nothing lies beside the server"


def test_runs_that_start_together_share_their_experiment(server: TeamServer, tmp_path: Path, alice: None) -> None:
    runs = [PatientRun(tmp_path / str(n) / "together") for n in range(4)]
    trackers = [run.tracker(server.uri) for run in runs]
    for tracker in trackers:
        tracker.start()
    assert all(tracker.close("FINISHED", PATIENCE_S) for tracker in trackers)
    assert [run.warnings for run in runs] == [[]] * 4
    assert len(recorded_runs(server.uri, runs[0])) == 4


def interrupted_run(run: PatientRun, server: TeamServer, break_it: Any, mend_it: Any) -> None:
    """A run that measures before, while and after something is broken, and what MLflow has of it in the end."""
    (run.folder / "report.html").write_text("<html>")
    tracker = run.tracker(server.uri)
    tracker.start()
    tracker.stage_started("student", {"a": 1})
    run.measure(range(50))
    eventually(lambda: "student" in tracker.run_ids and len(history(server.uri, tracker.run_ids["student"], LOSS)) == 50)
    break_it()
    tracker.tags({"during": "outage"})
    tracker.artifact(run.folder / "report.html", "student")
    run.measure(range(50, 100))
    eventually(lambda: run.warnings)
    mend_it()
    run.measure(range(100, 150))
    tracker.stage_finished("student", "FINISHED", {})
    assert tracker.close("FINISHED", PATIENCE_S)
    assert len(run.warnings) == 1 and "the run goes on" in run.warnings[0]
    assert_recorded_once(server.uri, run, tracker.run_ids)
    assert client(server.uri).get_run(tracker.run_ids[PARENT]).data.tags["during"] == "outage"
    assert [f.path for f in client(server.uri).list_artifacts(tracker.run_ids["student"])] == ["report.html"]


def test_a_server_killed_mid_run_loses_nothing(run: PatientRun, server: TeamServer, alice: None) -> None:
    def mend() -> None:
        server.start()
        server.wait()

    interrupted_run(run, server, server.kill, mend)


def test_a_database_killed_mid_run_loses_nothing(run: PatientRun, server: TeamServer, postgres: Postgres, alice: None) -> None:
    interrupted_run(run, server, postgres.kill, postgres.start)


@pytest.mark.timeout(1800)
def test_a_run_of_several_nodes_on_what_the_team_shares(
    reference: Reference, server: TeamServer, postgres: Postgres, s3: Any, tmp_path: Path, alice: None
) -> None:
    """Storage on S3, MLflow on PostgreSQL and S3, a node killed while it labels: the student is the one that a laptop makes."""
    storage = Storage(urlsplit(s3.meta.endpoint_url).port or 0)
    storage.client.create_bucket(Bucket=STORAGE_BUCKET)
    job = reference.job | {"storage": f"s3://{STORAGE_BUCKET}/shared", "tracking": {"uri": server.uri}}
    known = {name: os.environ[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
    with cluster(tmp_path / "cluster", cpus=0, env=storage.environment | known) as running:
        running.add_node(2, storage.environment)
        running.add_node(2, storage.environment)
        running.await_nodes(3)
        submit = (*DISTILL, "submit", write_job(job, tmp_path), "--wait", *running.where)
        with started(tmp_path / "log", *submit, env=running.client_env) as command:
            command.until(lambda: len(committed(storage)) >= 3, every_s=0.2)
            hits, before = running.holder(LABELLER).kill(), committed(storage)
            assert hits and len(before) < reference.shards, "killed after the last label"
            running.add_node(2, storage.environment)
            to_commit_s = command.until(lambda: len(committed(storage)) > len(before), every_s=0.2)
            ended = command.wait().assert_ok()
    print(json.dumps({"team": {"to_commit_s": round(to_commit_s, 1), "run_s": round(ended.seconds, 1)}}))
    local = storage.download("shared", tmp_path / "store")
    assert_every_row_labelled_once(local)
    assert student_weights(local) == reference.weights

    experiment = client(server.uri).get_experiment_by_name("distill").experiment_id
    runs = {r.info.run_name.partition(":")[0]: r.info.run_id for r in client(server.uri).search_runs([experiment])}
    points = [(point["step"], point["metrics"].get(LOSS)) for point in metric_points(local, "student")]
    losses = [(step, loss) for step, loss in points if loss is not None]
    assert history(server.uri, runs["tiny/student"], LOSS) == losses and len(losses) > 3
    for run_id in runs.values():
        assert postgres.query("SELECT status FROM runs WHERE run_uuid = %s", run_id) == [("FINISHED",)]
    kept = s3.get_object(Bucket=BUCKET, Key=f"mlflow/{experiment}/{runs['tiny']}/artifacts/report.html")
    assert kept["Body"].read() == (local / "runs" / "tiny" / "report.html").read_bytes()


def committed(storage: Storage) -> list[str]:
    """Commit records of the label log in the bucket."""
    return [name for name in storage.names("shared/labels/") if "/commits/" in name]


def test_no_secret_leaves_its_place(
    run: PatientRun, server: TeamServer, postgres: Postgres, s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = server.uri.replace("://", "://alice:{}@")
    wrong = run.tracker(address.format("canary-guess"))
    wrong.start()
    wrong.stage_started("student", {"a": 1})
    run.measure(range(10))
    eventually(lambda: run.warnings)
    assert not wrong.close("FINISHED", 0.0) and "***@" in run.warnings[0]

    right = run.tracker(address.format(SECRETS["USER"]))
    right.start()
    right.artifact(run.spool.path, "student")
    assert right.close("FINISHED", PATIENCE_S)
    sign_in(monkeypatch, "alice", SECRETS["USER"])
    assert_recorded_once(server.uri, run, right.run_ids)

    objects = s3.list_objects_v2(Bucket=BUCKET)["Contents"]
    places = {
        "warnings and addresses": "\n".join([*run.warnings, wrong.address, right.address]).encode(),
        "run directory": b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()),
        "server's log": server._log.read_bytes(),
        "database's log": (postgres.folder / "log").read_bytes(),
        "command lines": repr([p.cmdline() for p in server.processes]).encode(),
        "database": postgres.dump(),
        "bucket": b"".join(s3.get_object(Bucket=BUCKET, Key=o["Key"])["Body"].read() for o in objects),
    }
    found = [(name, place) for place, content in places.items() for name, s in SECRETS.items() if s.encode() in content]
    assert not found and not [place for place, content in places.items() if b"canary-guess" in content]
    # The places were not empty, and the secrets in use.
    assert b"mlflow.server" in places["command lines"] and right.run_ids["student"].encode() in places["database"]
    assert LOSS.encode() in places["bucket"] and LOSS.encode() in places["run directory"]
    assert SECRETS["PGPASSWORD"] == server.processes[0].environ()["PGPASSWORD"]


def test_the_users_are_in_the_database_too(server: TeamServer, postgres: Postgres) -> None:
    settings = configparser.ConfigParser()
    settings.read(MLFLOW / "auth.ini")
    name = settings["mlflow"]["database_uri"].rpartition("/")[2]
    assert {u for (u,) in postgres.query("SELECT username FROM users", database=name)} == {"admin", "alice", "bob"}
