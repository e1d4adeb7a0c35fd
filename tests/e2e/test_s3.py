"""A whole run with its storage in a bucket: the same result as in a directory, reused, and continued when it was killed."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.s3 import BUCKET, Server, s3_server
from tests.tiny import DISTILL as COMMAND
from tests.tiny import (
    LABELLER,
    TRAINER,
    Ended,
    Json,
    Reference,
    assert_every_row_labelled_once,
    contents,
    distill,
    only,
    report,
    started,
    statuses,
    student_weights,
    tiny_job,
    write_corpus,
    write_job,
)

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@dataclass(frozen=True)
class Remote:
    """A job whose storage is in the bucket."""

    job: Json
    server: Server
    folder: Path
    node: Path
    """Where processes of the run keep temporary files."""

    @property
    def prefix(self) -> str:
        return self.job["storage"].removeprefix(f"s3://{BUCKET}/")

    @property
    def file(self) -> Path:
        return write_job(self.job, self.folder)

    def run(self) -> Ended:
        return distill(self.folder / "log", "run", self.file)

    def download(self) -> Path:
        """The storage as a directory."""
        return self.server.download(self.prefix, self.folder / uuid.uuid4().hex)


@pytest.fixture
def remote(reference: Reference, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    # Sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="node", dir="/tmp", ignore_cleanup_errors=True) as node:
        monkeypatch.setenv("TMPDIR", node)
        yield Remote(reference.job | {"storage": f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/tiny"}, server, tmp_path, Path(node))


@pytest.mark.cluster
def test_a_run_in_a_bucket_is_the_run_in_a_directory(reference: Reference, remote: Remote) -> None:
    ended = remote.run().assert_ok()
    assert ended.started(LABELLER) and ended.started(TRAINER)
    assert f"run {remote.job['storage']}/runs/tiny" in ended.stderr
    storage = remote.download()
    assert_every_row_labelled_once(storage)
    assert student_weights(storage) == reference.weights
    assert "checkpoints" not in contents(only(storage / "student")), "those of a finished training are dropped"
    names = {file.name for file in (storage / "runs" / "tiny").iterdir()}
    assert {"job.yaml", "plan.json", "run.json", "report.json", "report.html", "summary.md", "metrics.jsonl"} <= names
    exported, student = (contents(folder) for folder in (storage / "runs/tiny/export", only(storage / "student") / "model"))
    assert exported.items() >= student.items() and exported.keys() - student.keys() == {"README.md"}
    assert not list(remote.node.rglob("*.parquet"))

    shown = distill(remote.folder / "report", "report", f"{remote.job['storage']}/runs/tiny").assert_ok()
    assert shown.stdout == (storage / "runs" / "tiny" / "summary.md").read_text()
    log = f"{remote.job['storage']}/labels/{only(storage / 'labels').name}"
    verified = distill(remote.folder / "verify", "labels", "verify", log).assert_ok()
    assert verified.stdout.startswith(f"{reference.shards} shards, ")

    again = remote.run().assert_ok()
    storage = remote.download()
    found = statuses(storage)
    assert {found[stage] for stage in ("data", "teacher", "labels", "student")} == {"reused"}, found
    assert not again.started(LABELLER) and not again.started(TRAINER)
    assert report(storage)["labels"]["reused_shards"] == reference.shards
    assert student_weights(storage) == reference.weights


@pytest.mark.cluster
def test_a_killed_run_in_a_bucket_is_continued(reference: Reference, remote: Remote) -> None:
    with started(remote.folder / "killed", *COMMAND, "run", remote.file) as command:
        command.until(
            lambda: any("checkpoints/step-0000" in n and n.endswith(".index.json") for n in student(remote)), every_s=0.2
        )
        command.kill()
    assert not [name for name in student(remote) if name.endswith("/manifest.json") and "checkpoints" not in name]
    remote.run().assert_ok()
    storage = remote.download()
    assert statuses(storage)["teacher"] == "reused"
    assert_every_row_labelled_once(storage)
    assert student_weights(storage) == reference.weights


def student(remote: Remote) -> list[str]:
    return remote.server.names(f"{remote.prefix}/student/")


def test_a_bucket_that_is_not_there_ends_the_run_before_it_begins(server: Server, tmp_path: Path) -> None:
    job = tiny_job(write_corpus(tmp_path / "corpus"), tmp_path) | {"storage": "s3://no-such-bucket/x"}
    ended = distill(tmp_path / "log", "run", write_job(job, tmp_path))
    assert (ended.code, len(ended.stderr.splitlines())) == (4, 1), ended.stderr
    assert "s3://no-such-bucket/x" in ended.stderr
    assert not ended.started("raylet")


def test_tracking_in_a_bucket_needs_an_address(server: Server, tmp_path: Path) -> None:
    job = tiny_job(write_corpus(tmp_path / "corpus"), tmp_path) | {"storage": f"s3://{BUCKET}/untracked", "tracking": {}}
    ended = distill(tmp_path / "log", "run", write_job(job, tmp_path))
    assert (ended.code, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert "tracking.uri" in ended.stderr
    assert not ended.started("raylet")
