"""What may leave this machine with a job, how its end is told, and what a cluster is refused for; no cluster needed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.runtime import environment
from orchestrator.runtime.nodes import check_same, check_shared
from orchestrator.runtime.versions import code_digest, versions
from orchestrator.spec.load import load_job, resolved_yaml
from orchestrator.submit import portable_job
from tests.clusters import free_port
from tests.tiny import distill

NO_NETWORK = "198.51.100.7:8265"
"""Documentation has this address to itself: nobody answers, and nobody refuses."""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text("name: a\nstorage: /shared/store\ntracking: {uri: 'http://u:${oc.env:CANARY}@host:5000'}\n")
    return file


# What travels.


def test_references_travel_and_values_do_not(job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CANARY", raising=False)
    away = portable_job(job, ["export.directory='\\${literal}'"])
    monkeypatch.setenv("CANARY", "hunter2")
    assert portable_job(job, ["export.directory='\\${literal}'"]) == away, "this machine's environment changes nothing"
    there = tmp_path / "there.yaml"
    there.write_text(resolved_yaml(away, interpolated=False))
    assert "hunter2" not in there.read_text()
    arrived = load_job(there)
    assert arrived.tracking.uri == "http://u:hunter2@host:5000"
    assert arrived.export.directory == "${literal}"
    here = load_job(job, ["export.directory='\\${literal}'"])
    assert arrived.cluster.address == "auto" != here.cluster.address
    assert arrived.model_copy(update={"cluster": here.cluster}) == here


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("storage=./store", "storage: ./store is relative"),
        ("tracking.uri=http://u:hunter2@host", "tracking.uri: holds a password"),
        ("tracking.uri=http://host/?token=hunter2", "tracking.uri: holds a password"),
        ("storage=s3://u:hunter2@bucket", "storage"),
        ("train.steps='${oc.env:STEPS}'", "train.steps"),
        ("name='${oc.env:NAME}'", "name"),
    ],
)
def test_a_job_that_cannot_travel(override: str, expected: str, job: Path) -> None:
    with pytest.raises(SpecError) as refusal:
        portable_job(job, [override])
    assert expected in str(refusal.value) and "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "http://user@host", "postgresql://u:${oc.env:A}@host/db", "sqlite:////x/y"]
)
def test_an_address_without_a_password_travels(uri: str, job: Path) -> None:
    assert portable_job(job, [f"tracking.uri='{uri}'"]).tracking.uri == uri


def test_the_key_of_a_submission_is_the_jobs(job: Path) -> None:
    def key(*overrides: str) -> str:
        return fingerprint("submission", portable_job(job, overrides).model_dump(mode="json"))

    assert key() == key() == key("seed=0") != key("seed=1")


# With which Python it runs.

RAYLET = """
import subprocess, sys
supervisor = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1], shell=True).returncode)"
sys.exit(subprocess.run([sys.executable, "-c", supervisor, sys.argv[1]]).returncode)
"""
"""As Ray starts a job: a raylet, a supervisor below it, a shell below that."""


@pytest.mark.parametrize("given", ["DISTILL_PYTHON", "raylet", "PATH", "nothing"])
def test_a_job_finds_the_python_that_ray_runs_with(given: str, tmp_path: Path) -> None:
    from orchestrator.runtime.jobs import ENTRYPOINT

    python = tmp_path / "venv" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$0 $*"\n')
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sed", "tr"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    path = f"{tools}:{python.parent}" if given == "PATH" else str(tools)
    env = {"PATH": path} | ({"DISTILL_PYTHON": str(python)} if given == "DISTILL_PYTHON" else {})
    flag = f"--python_worker_command={python if given == 'raylet' else '/nowhere/python'} setup_worker.py"
    command = [sys.executable, "-c", RAYLET, ENTRYPOINT.replace("VERB", "run"), flag]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if given == "nothing":
        assert (ended.returncode, ended.stdout) == (4, "")
        (line,) = ended.stderr.splitlines()
        assert line.startswith("distill: ") and "DISTILL_PYTHON" in line and len(line) <= 310
    else:
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{python} -m orchestrator.cli run job.yaml\n", "")


# How it ended.


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 6),
        ("STOPPED", None, 143),
        ("RUNNING", None, None),
    ],
)
def test_the_exit_code_is_the_runs(status: str, driver: int | None, expected: int | None) -> None:
    from ray.job_submission import JobDetails, JobStatus, JobType

    from orchestrator.runtime.jobs import Submission

    details = JobDetails(type=JobType.SUBMISSION, status=JobStatus(status), entrypoint="x", driver_exit_code=driver)
    assert Submission.of(details).exit_code == expected


# What a cluster is refused for.


def test_nodes_that_differ_are_named() -> None:
    ours = {"python": "3.11.2", "torch": "2.13.0"}
    check_same({"a": ours, "b": dict(ours)})
    with pytest.raises(EnvironmentFault, match=r"b:torch:2\.12\.1; but a:torch:2\.13\.0"):
        check_same({"a": ours, "b": ours | {"torch": "2.12.1"}, "c": ours})


def test_storage_that_is_not_shared_is_named() -> None:
    names = {"1" * 56: "10.0.0.1", "2" * 56: "10.0.0.2"}
    check_shared({"10.0.0.1": [], "10.0.0.2": []}, names, "/store")
    with pytest.raises(EnvironmentFault, match=r"/store: node 10\.0\.0\.2 does not see what 10\.0\.0\.1 wrote"):
        check_shared({"10.0.0.1": [], "10.0.0.2": ["1" * 56]}, names, "/store")


def test_the_code_has_a_digest() -> None:
    assert len(code_digest()) == 12 and code_digest() == code_digest()
    assert versions()["python"].startswith("3.")


# Tokens and addresses.


def test_a_local_ray_gets_a_token_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "home" / ".ray" / "auth_token"
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path / "home")})
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert environment.ray_token() == file
    environment.prepare_ray(local=False)
    assert not file.exists(), "a token of our own is none for somebody's cluster"
    environment.prepare_ray(local=True)
    made = file.read_text()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(made) == 64 and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [f.name for f in file.parent.iterdir()] == ["auth_token"]
    environment.prepare_ray(local=True)
    assert file.read_text() == made


def test_a_token_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, problem in (("none", "No such file"), ("empty", "is empty")):
        ended = distill(tmp_path, "list", env={"RAY_AUTH_TOKEN_PATH": str(tmp_path / name)})
        assert ended.code == 4 and ended.stderr.startswith("distill: RAY_AUTH_TOKEN_PATH:") and problem in ended.stderr


def test_a_given_address_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_API_SERVER_ADDRESS": "http://old:1"})
    assert environment.job_server_url(None) == "http://old:1"
    assert environment.job_server_url("new:2") == "http://new:2" == os.environ["RAY_API_SERVER_ADDRESS"]


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        (NO_NETWORK, 4, NO_NETWORK),
        ("127.0.0.1:FREE", 4, "127.0.0.1"),
        ("ray://127.0.0.1:10001", 2, "--address"),
    ],
)
def test_an_address_where_nobody_answers(address: str, code: int, words: str, tmp_path: Path) -> None:
    ended = distill(tmp_path, "list", "--address", address.replace("FREE", str(free_port())))
    assert ended.code == code, ended.stderr
    (line,) = ended.stderr.strip().split("\n")
    assert line.startswith("distill: ") and words in line and len(line) <= 310
    assert ended.seconds < 60


def test_a_cluster_to_join_where_nobody_answers(job: Path, tmp_path: Path) -> None:
    changes = (f"storage={tmp_path}/store", f"cluster.address={NO_NETWORK}", "tracking={enabled: false}")
    ended = distill(tmp_path, "run", job, *(word for change in changes for word in ("-c", change)))
    assert ended.code == 4, ended.stderr
    assert "cluster.address" in ended.stderr.strip().split("\n")[-1]
    assert ended.seconds < 90


# The command.


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, typer.testing; from orchestrator.cli import app; "
        "result = typer.testing.CliRunner().invoke(app, ['--help']); print(result.output); "
        "print('HEAVY', sorted({'torch', 'ray', 'mlflow', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("HEAVY []")
    for verb in ("submit", "status", "logs", "stop", "list", "doctor", "run"):
        assert f" {verb} " in output


def test_python_programs_have_the_same_verbs(job: Path) -> None:
    from orchestrator import api

    assert {name for name in api.__all__ if callable(getattr(api, name))} == {
        "load_job",
        "plan",
        "run",
        "submit",
        "sweep",
        "compare",
    }
    assert api.plan(api.load_job(job, ["tracking.uri=null"])).job.name == "a"


def test_doctor_says_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    found = {"name": "a", "storage": str(tmp_path / "store"), "tracking": {"uri": f"http://u:hunter2@127.0.0.1:{free_port()}"}}
    file.write_text(json.dumps(found))
    ended = distill(tmp_path / "log", "doctor", file)
    assert ended.code == 4 and ended.stderr.strip().endswith("missing: tracking")
    verdicts = {line.split()[1]: line.split()[0] for line in ended.stdout.strip().split("\n")}
    fine = dict.fromkeys(("packages", "devices", "token", "models", "storage"), "ok")
    assert verdicts == fine | {"tracking": "MISSING"}
    assert "hunter2" not in ended.stdout + ended.stderr
    assert distill(tmp_path / "log", "doctor", file, "-c", "tracking.uri=null").code == 0
