"""Runs on real clusters: submitted, watched, stopped, refused; nodes that do not fit together, and nodes that die."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from tests.clusters import Cluster, cluster, losing_replies
from tests.tiny import (
    DISTILL,
    LABELLER,
    STEPS,
    TRAINER,
    Ended,
    Json,
    Reference,
    assert_every_row_labelled_once,
    commits,
    distill,
    eventually,
    started,
    statuses,
    steps_seen,
    student_weights,
    tiny_job,
    write_corpus,
    write_job,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

CANARY = "canary-7f3a91c2"
FEW, MANY = "train.steps=20", "train.steps=1000000"
OK, SPEC, DATA, ENVIRONMENT, LOCKED, INTERRUPTED, STOPPED = 0, 2, 3, 4, 7, 130, 143


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node that knows a secret."""
    with cluster(tmp_path_factory.mktemp("head"), cpus=2, env={"DISTILL_CANARY": CANARY}) as running:
        yield running


def secret_job(folder: Path, name: str) -> Json:
    """The tiny job, its tracking server behind a password that only the cluster knows, and dead."""
    job = tiny_job(write_corpus(folder / "corpus"), folder / "store")
    return job | {"name": name, "tracking": {"uri": "http://user:${oc.env:DISTILL_CANARY}@127.0.0.1:9"}}


def one_line(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended.stderr[-4000:]
    last = ended.stderr.strip().split("\n")[-1]
    assert last.startswith("distill: ") and "Traceback" not in ended.stderr, ended.stderr[-4000:]
    for word in words:
        assert word in last, last


# One node.


def test_a_submitted_run_and_its_continuation(head: Cluster, tmp_path: Path) -> None:
    file = write_job(secret_job(tmp_path, "first"))
    ended = head.distill(tmp_path / "log", "submit", file, "-c", FEW, "--wait").assert_ok()
    submission = ended.stdout.strip()
    assert submission.startswith("first-") and submission.endswith("-1")
    assert "student   ran" in ended.stderr and f"{submission}  SUCCEEDED" in ended.stderr
    assert statuses(tmp_path / "store", "first")["student"] == "ran"
    assert "student   ran" in head.distill(tmp_path / "log", "logs", "first").stdout
    state = json.loads(head.distill(tmp_path / "log", "status", submission, "--json").stdout)
    assert (state["id"], state["run"], state["status"], state["exit_code"]) == (submission, "first", "SUCCEEDED", 0)
    assert state["ended_s"] > state["started_s"] > 1.7e9
    seen = everything_seen(head, tmp_path / "store")
    assert CANARY.encode() not in seen
    assert b"DISTILL_CANARY" in seen and b"http://***@127.0.0.1:9" in seen, "the search finds what is there"

    again = head.distill(tmp_path / "log", "submit", file, "-c", FEW, "--wait").assert_ok()
    assert again.stdout.strip() == submission[:-1] + "2"
    assert statuses(tmp_path / "store", "first")["student"] == "reused"
    listed = json.loads(head.distill(tmp_path / "log", "list", "--json").stdout)
    assert [s["id"] for s in listed if s["run"] == "first"] == [submission, again.stdout.strip()]


def everything_seen(head: Cluster, storage: Path) -> bytes:
    """Run directory and storage, all that Ray keeps on disk, and all that its job server tells."""
    told = head.ask("/api/jobs/")
    files = [f for folder in (storage, head.temp, head.folder) for f in folder.rglob("*") if stat.S_ISREG(f.lstat().st_mode)]
    assert any("job-driver-first" in f.name for f in files) and any(f.name == "job.yaml" for f in files)
    return told + b"".join(f.read_bytes() for f in files)


def test_a_run_that_is_going_on(head: Cluster, tmp_path: Path) -> None:
    file = write_job(secret_job(tmp_path, "endless"))
    with losing_replies(head) as proxy:
        lost = distill(tmp_path / "log", "submit", file, "-c", MANY, "--address", proxy, env=head.client_env)
        one_line(lost, ENVIRONMENT, proxy)
    repeated = head.distill(tmp_path / "log", "submit", file, "-c", MANY).assert_ok()
    submission = repeated.stdout.strip()
    assert submission.endswith("-1") and "is going on already" in repeated.stderr
    one_line(head.distill(tmp_path / "log", "submit", file, "-c", FEW), LOCKED, submission)
    with (
        started(tmp_path / "a", *DISTILL, "logs", "endless", "-f", *head.where, env=head.client_env) as interrupted,
        started(tmp_path / "b", *DISTILL, "submit", file, "-c", MANY, "--wait", *head.where, env=head.client_env) as waiting,
        started(tmp_path / "c", *DISTILL, "status", "--watch", *head.where, env=head.client_env) as watching,
    ):
        eventually(lambda: steps_of(tmp_path, "endless") > 3, "training is under way", every_s=0.5)
        interrupted.interrupt()
        left = interrupted.wait()
        assert left.code == INTERRUPTED and f"distill stop {submission}" in left.stderr, left.stderr
        assert json.loads(head.distill(tmp_path / "log", "status", "endless", "--json").stdout)["status"] == "RUNNING"
        stopped = head.distill(tmp_path / "log", "stop", "endless").assert_ok()
        assert f"{submission}  STOPPED" in stopped.stdout
        assert (waiting.wait().code, watching.wait().code) == (STOPPED, STOPPED)
    assert "student" in watching.wait().stdout
    assert (
        "terminated; what was done is kept; run the same job again to continue"
        in head.distill(tmp_path / "log", "logs", submission).stdout
    )
    assert statuses(tmp_path / "store", "endless").get("student") != "ran"


def steps_of(folder: Path, name: str) -> int:
    file = folder / "store" / "runs" / name / "metrics.jsonl"
    return file.read_text().count('"student') if file.exists() else 0


def test_the_same_job_submitted_twice_at_once(head: Cluster, tmp_path: Path) -> None:
    file = write_job(secret_job(tmp_path, "twice"))
    args = (*DISTILL, "submit", file, "-c", FEW, "--wait", *head.where)
    with (
        started(tmp_path / "a", *args, env=head.client_env) as one,
        started(tmp_path / "b", *args, env=head.client_env) as other,
    ):
        ends = [one.wait().assert_ok(), other.wait().assert_ok()]
    assert len({ended.stdout for ended in ends}) == 1
    assert sorted("is going on already" in ended.stderr for ended in ends) == [False, True]


def test_a_failing_run_ends_with_its_own_code(head: Cluster, tmp_path: Path) -> None:
    file = write_job(secret_job(tmp_path, "failing"))
    ended = head.distill(tmp_path / "log", "submit", file, "-c", "data.source.paths=[/no/such/*.py]", "--wait")
    assert ended.code == DATA, ended.stderr
    assert "/no/such/*.py" in ended.stderr and "exit code 3" in ended.stderr
    missing = head.distill(tmp_path / "log", "submit", file, "-c", "storage='${oc.env:NOBODY_HAS_THIS}/x'", "--wait")
    assert missing.code == SPEC and "NOBODY_HAS_THIS is not set" in missing.stderr


def test_what_is_refused(head: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    nobody, stranger = {"HOME": str(tmp_path)}, {"RAY_AUTH_TOKEN": "0" * 64}
    one_line(distill(log, "list", *head.where, env=nobody), ENVIRONMENT, "401", "token")
    one_line(distill(log, "list", *head.where, env=stranger), ENVIRONMENT, "403", "token")
    for verb in ("status", "logs", "stop"):
        one_line(head.distill(log, verb, "no-such-run"), SPEC, "no-such-run")
        one_line(head.distill(log, verb, "../x"), SPEC, "../x")


def test_doctor_looks_at_the_cluster(head: Cluster, tmp_path: Path) -> None:
    file = write_job(secret_job(tmp_path, "patient") | {"tracking": {"enabled": False}})
    ended = head.distill(tmp_path / "log", "doctor", file).assert_ok()
    found = [line.split()[:2] for line in ended.stdout.split("\n") if line.startswith("ok")]
    here, there = ["packages", "devices", "token", "ray"], ["packages", "devices", "token", "storage", "nodes"]
    assert [what for _, what in found] == here + there
    assert "patient" not in head.distill(tmp_path / "log", "list").stdout
    ended = head.distill(tmp_path / "log", "doctor", file, "-c", "storage=/proc/no-such")
    assert ended.code == ENVIRONMENT and "MISSING  storage" in ended.stdout


# Several nodes.


def test_nodes_that_do_not_fit_together(tmp_path: Path) -> None:
    other = tmp_path / "other" / "transformers-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    job = tiny_job(write_corpus(tmp_path / "corpus"), tmp_path / "store")
    file = write_job(job)
    hidden = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path}/store && exec "$@"', "sh")
    (tmp_path / "store").mkdir()
    with cluster(tmp_path / "head", cpus=2) as running:
        running.add_node(1, env={"PYTHONPATH": str(tmp_path / "other")})
        running.await_nodes(2)
        one_line_in_log(running.distill(tmp_path / "log", "submit", file, "--wait"), "127.0.0.2:transformers:0.0.1")
        running.nodes[0].kill()
        running.add_node(1, within=hidden)
        running.await_nodes(2)
        one_line_in_log(running.distill(tmp_path / "log", "submit", file, "--wait"), f"storage {tmp_path}/store", "127.0.0.3")
    assert not commits(tmp_path / "store"), "refused before any work"


def one_line_in_log(ended: Ended, *words: str) -> None:
    assert ended.code == ENVIRONMENT, ended.stderr[-4000:]
    (line,) = [line for line in ended.stderr.split("\n") if line.startswith("distill: ")]
    for word in words:
        assert word in line, line


def test_nodes_that_die_cost_no_label_and_no_bit(reference: Reference, tmp_path: Path) -> None:
    """One node is killed during labelling, another during training: the student is the one that a laptop makes."""
    job = reference.copy(tmp_path / "cluster")
    storage, file = Path(job["storage"]), write_job(job)
    with cluster(tmp_path / "head", cpus=0) as running:
        running.add_node(2)
        running.add_node(2)
        running.await_nodes(3)
        with started(tmp_path / "log", *DISTILL, "submit", file, "--wait", *running.where, env=running.client_env) as run:
            run.until(lambda: len(commits(storage)) >= 3)
            hits, before = running.holder(LABELLER).kill(), commits(storage)
            assert hits and len(before) < reference.shards, "killed after the last label"
            running.add_node(2)
            to_commit_s = run.until(lambda: len(commits(storage)) > len(before))
            run.until(lambda: steps_seen(storage) >= 30)
            hits, steps = running.holder(TRAINER).kill(), steps_seen(storage)
            assert hits and steps < STEPS, "killed after the last step"
            running.add_node(2)
            to_step_s = run.until(lambda: steps_seen(storage) > steps)
            ended = run.wait().assert_ok()
    facts = {"commits_at_kill": len(before), "to_commit_s": to_commit_s, "steps_at_kill": steps, "to_step_s": to_step_s}
    print(json.dumps({"nodes": {name: round(value, 1) for name, value in (facts | {"run_s": ended.seconds}).items()}}))
    assert "a training worker died; retry" in ended.stderr
    now = commits(storage)
    assert {name: now[name] for name in before} == before
    assert_every_row_labelled_once(storage)
    assert student_weights(storage) == reference.weights


def test_nodes_that_speak_tls_alone(tmp_path: Path) -> None:
    """Two nodes under the certificates of `cluster/tls.sh`; one without any, the negative control, does not get in."""
    script, own = Path(__file__).parents[2] / "cluster" / "tls.sh", get_node_ip_address()
    certificates = tmp_path / "tls"
    subprocess.run(["bash", script, certificates, "127.0.0.1", "127.0.0.2", own], check=True, capture_output=True)
    tls = {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(certificates / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(certificates / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(certificates / "node.key"),
    }
    job = tiny_job(write_corpus(tmp_path / "corpus"), tmp_path / "store")
    with cluster(tmp_path / "head", cpus=1, env=tls) as running:
        running.add_node(2, env=tls)
        running.await_nodes(2)
        running.distill(tmp_path / "log", "submit", write_job(job), "-c", FEW, "--wait").assert_ok()
        stranger = running.add_node(1)
        eventually(lambda: stranger.ended, "a node without certificates is turned away", every_s=0.5)
    assert statuses(tmp_path / "store")["student"] == "ran"


def test_a_cluster_that_has_yet_to_grow(tmp_path: Path) -> None:
    """There is a head without CPUs, and an autoscaler that adds what is asked for."""
    file = write_job(tiny_job(write_corpus(tmp_path / "corpus"), tmp_path / "store"))
    with cluster(tmp_path / "head", cpus=0, growth=(2, 1)) as running:
        running.await_nodes(1)
        ended = running.distill(tmp_path / "log", "submit", file, "-c", FEW, "--wait").assert_ok()
        running.await_nodes(2)
    print(json.dumps({"growing": {"run_s": round(ended.seconds, 1)}}))
    assert statuses(tmp_path / "store")["student"] == "ran"
