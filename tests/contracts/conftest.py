"""What contract tests share: a head that is taken in several chunks, and an S3 server that can be spoiled."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.losses import head
from orchestrator.store import bucket, lease
from orchestrator.store.s3 import S3Store
from tests.s3 import BUCKET, Proxy, Server, proxy, s3_server

ROWS_PER_CHUNK = 7


@pytest.fixture
def rows_per_chunk(monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that the chunked head takes at a time, few enough that every case has several chunks."""
    monkeypatch.setattr(head, "head_rows", lambda *_: ROWS_PER_CHUNK)
    monkeypatch.setattr(head, "NARROWED_AT_A_TIME", 5)
    return ROWS_PER_CHUNK


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as running:
        yield running


@pytest.fixture
def environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """That of a machine that may use the server, with a folder for copies of its own."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    point_at(server, monkeypatch)
    yield monkeypatch
    bucket._client.cache_clear()


def point_at(server: Server | Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket._client.cache_clear()


@pytest.fixture
def s3(environment: pytest.MonkeyPatch) -> S3Store:
    return S3Store(f"s3://{BUCKET}/{uuid.uuid4().hex}/deep")


@pytest.fixture
def spoiled(s3: S3Store, server: Server, environment: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What `s3` talks to from now on."""
    environment.setattr(bucket, "FIRST_PAUSE_S", 0.01)
    environment.setattr(bucket, "PAUSES_S", (0.01, 0.01, 0.01))
    with proxy(server) as running:
        point_at(running, environment)
        yield running


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "STALE_S", 1.5)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
