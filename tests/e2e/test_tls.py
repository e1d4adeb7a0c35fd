"""A Ray under the certificates of `cluster/tls.sh` answers whoever has one of them, and nobody else."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_mlflow import free_port

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
JOIN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(lambda: "done on the cluster").remote()))
"""


def node_ip() -> str:
    """Where a node is reached: Ray takes this machine's address in the place of 127.0.0.1."""
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def certified(folder: Path) -> dict[str, str]:
    """Make certificates in `folder`; the environment of a node or client that has them."""
    subprocess.run([ROOT / "cluster" / "tls.sh", folder, node_ip()], check=True, capture_output=True)
    files = {"CA_CERT": "ca.crt", "SERVER_CERT": "node.crt", "SERVER_KEY": "node.key"}
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(folder / file) for name, file in files.items()}


@dataclass(frozen=True)
class Head:
    address: str
    token: dict[str, str]
    certificates: dict[str, str]

    def check(self, **environment: str) -> int:
        """Exit code of a health check by a client that has the token, and `environment`."""
        command = [RAY, "health-check", "--address", self.address]
        variables = os.environ | self.token | environment
        return subprocess.run(command, env=variables, capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head node in processes of its own; its folder has a short name, for sockets lie in it."""
    folder, port = Path(tempfile.mkdtemp(prefix="tls-", dir="/tmp")), free_port()
    (folder / "token").touch(0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    head = Head(f"{node_ip()}:{port}", token, certified(folder / "certificates"))
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--node-ip-address={node_ip()}", "--num-cpus=1"]
    command += [f"--temp-dir={folder}/ray", "--include-dashboard=false", "--disable-usage-stats"]
    variables = os.environ | token | head.certificates | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = list(takewhile(lambda line: "Ray runtime started" not in line, process.stdout))
        assert process.poll() is None, said
        yield head
    finally:
        ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(60)
        for left in psutil.wait_procs(ours, timeout=10)[1]:
            left.kill()
        shutil.rmtree(folder)


def test_a_client_with_a_certificate_runs_tasks(head: Head) -> None:
    environment = os.environ | head.token | head.certificates
    done = subprocess.run(
        [sys.executable, "-c", JOIN, head.address], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "done on the cluster", done.stderr[-2000:]


def test_nobody_else_gets_an_answer(head: Head, tmp_path: Path) -> None:
    assert head.check(**head.certificates) == 0
    assert head.check(RAY_USE_TLS="0") != 0, "a client without TLS"
    assert head.check(**certified(tmp_path / "other")) != 0, "a client of another authority"
    assert head.check(**head.certificates, RAY_AUTH_TOKEN="f" * 64) != 0, "a client with another token"
