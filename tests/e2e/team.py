"""What a team shares: an MLflow server as `cluster/mlflow/compose.yaml` has it, with its PostgreSQL."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.e2e.mlflow_runs import Server, eventually, free_port

ROOT = Path(__file__).parent.parent.parent
MLFLOW = ROOT / "cluster" / "mlflow"
BUCKET = "team"
SECRETS = {
    name: f"canary-{name.lower()}-{os.urandom(8).hex()}"
    for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "USER")
}
"""What must be found nowhere but where it was put."""


def binaries() -> Path | None:
    """The folder of PostgreSQL's server programs; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places else None


class Postgres:
    """A PostgreSQL server with a cluster of its own, run by a user who is not root; its user mlflow has a password."""

    def __init__(self) -> None:
        programs = binaries()
        if programs is None:
            pytest.skip("no PostgreSQL here: apt-get install postgresql")
        self.programs, self.port = programs, free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._as = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        password = self.folder / "password"
        password.write_text(SECRETS["PGPASSWORD"])
        initdb = [
            programs / "initdb",
            "-D",
            self.folder / "data",
            "-U",
            "mlflow",
            "--auth=scram-sha-256",
            f"--pwfile={password}",
        ]
        subprocess.run(initdb, check=True, capture_output=True, cwd=self.folder, **self._as)
        password.unlink()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", "data", "-p", str(self.port), "-k", self.folder, "-h", "127.0.0.1"],
                stdout=log, stderr=log, cwd=self.folder, start_new_session=True, **self._as,
            )  # fmt: skip
        eventually(self._answers)

    def kill(self) -> None:
        """As a machine fails: nobody gets to tidy up."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def query(self, statement: str, *values: object, database: str = "mlflow") -> list[tuple[Any, ...]]:
        import psycopg

        options: dict[str, Any] = {"user": "mlflow", "password": SECRETS["PGPASSWORD"], "dbname": database}
        with psycopg.connect(host="127.0.0.1", port=self.port, autocommit=True, **options) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def dump(self) -> bytes:
        """All that it keeps, as text."""
        environment = os.environ | {"PGPASSWORD": SECRETS["PGPASSWORD"]}
        command = [self.programs / "pg_dumpall", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow"]
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
        return subprocess.run(
            [self.programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)], check=False, capture_output=True
        ).returncode == 0  # fmt: skip


class TeamServer(Server):
    """The service `mlflow` of compose.yaml, as a process instead of a container."""

    def __init__(self, folder: Path, postgres: Postgres, endpoint: str) -> None:
        super().__init__(folder)
        service = yaml.safe_load((MLFLOW / "compose.yaml").read_text())["services"]["mlflow"]
        values = SECRETS | {"ARTIFACTS": f"s3://{BUCKET}/mlflow", "ALLOWED_HOSTS": f"127.0.0.1:{self.port}"}
        here = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(postgres.port),
            "MLFLOW_AUTH_CONFIG_PATH": str(MLFLOW / "auth.ini"),
            "AWS_ACCESS_KEY_ID": "team",
            "AWS_SECRET_ACCESS_KEY": SECRETS["AWS_SECRET_ACCESS_KEY"],
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
        }

        def filled(text: str) -> str:
            return re.sub(r"\$\{(\w+):\?\}", lambda found: values[found[1]], text)

        replaced = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={self.port}"}
        command = [replaced.pop(word, filled(word)) for word in service["command"]]
        assert not replaced and set(here) <= {*service["environment"], "PGPORT"}
        self._command = [sys.executable, "-m", *command, "--workers=1"]
        self._environment = os.environ | {k: filled(v) for k, v in service["environment"].items() if v} | here
        self._folder = folder

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )

    @property
    def processes(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]


def sign_in(patch: pytest.MonkeyPatch, user: str, password: str) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
