"""An S3 server to test against (moto, a process of its own), and a proxy before it that spoils chosen requests."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

BUCKET = "bucket"
ACCESS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Server:
    """A running S3 server with one bucket, and a client of another make than ours to look into it."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return ACCESS | {"AWS_ENDPOINT_URL": self.endpoint}

    @property
    def client(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects whose names begin with `prefix`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def download(self, prefix: str, folder: Path) -> Path:
        """The objects below `prefix` as files in `folder`."""
        for name in self.names(f"{prefix}/"):
            file = folder / name.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(name))
        return folder


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with log.open("wb") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        server = Server(port)
        server.client.create_bucket(Bucket=BUCKET)
        yield server
    finally:
        process.kill()
        process.wait()


Spoil = Literal["lose the reply", "hang up", "500", "503", "403", "409"]


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose path holds `fragment`."""

    method: str
    fragment: str
    spoil: Spoil
    times: int = 1
    fired: int = 0


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an S3 server, but for the `faults`, and without `conditions` as if they had none."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        self.target, self.faults, self.seen, self.conditions = target, [], [], True
        self._mutex = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    faults: list[Fault]
    seen: list[tuple[str, str]]
    """Method and path of every request."""

    @property
    def environment(self) -> dict[str, str]:
        return ACCESS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}"}

    def spoil(self, method: str, path: str) -> Spoil | None:
        with self._mutex:
            self.seen.append((method, path))
            for fault in self.faults:
                if fault.fired < fault.times and fault.method == method and fault.fragment in path:
                    fault.fired += 1
                    return fault.spoil
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        spoil = self.server.spoil(self.command, self.path)
        if spoil == "hang up":
            return
        if spoil is not None and spoil.isdigit():
            self._answer(int(spoil), {}, b"<Error><Code>Spoiled</Code><Message>by the test</Message></Error>")
            return
        headers = {k: v for k, v in self.headers.items() if self.server.conditions or not k.lower().startswith("if-")}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        if spoil is None:
            self._answer(reply.status, dict(reply.getheaders()), content)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length"):
                self.send_header(name, value)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
