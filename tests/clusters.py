"""Ray clusters of processes on this machine, as `ray start` makes them, with a job server and token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from tests.tiny import PATIENCE_S, Ended, distill, eventually, kill

HEAD_ADDRESS = "127.0.0.1"
FAKE_HEAD_NODE_ID = "f" * 51 + "0" * 5
"""Ray's provider of nodes for tests knows the head by it."""


class Node:
    """A node: `ray start --block` and all that it has started."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        with log.open("wb") as file:
            self._popen = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        self._log, self._killed = log, False

    def check(self) -> None:
        """Fails the test if the node has ended by itself."""
        assert self._killed or self._popen.poll() is None, self._log.read_text()[-4000:]

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return not self._killed and self._popen.poll() is not None

    def titles(self) -> set[str]:
        """First words of the command lines of its processes."""
        found: set[str] = set()
        for process in self._family():
            with contextlib.suppress(psutil.Error, IndexError):
                found.add(process.cmdline()[0])
        return found

    def kill(self) -> int:
        """SIGKILL to all its processes, as when a machine fails; how many it hit."""
        family, self._killed = self._family(), True
        hits = sum(map(kill, family))
        psutil.wait_procs(family, PATIENCE_S)
        self._popen.wait(PATIENCE_S)
        return hits

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._popen.pid)
            return [first, *first.children(recursive=True)]
        return []


class Cluster:
    """A head, and nodes that come and go. `env` is what the processes of the head have in their environment.

    With `growth` an autoscaler adds nodes of so many CPUs each, at most so many of them.
    """

    def __init__(
        self, folder: Path, cpus: int, env: dict[str, str] | None = None, growth: tuple[int, int] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.temp = folder, Path(tempfile.mkdtemp(prefix="dc", dir="/tmp"))  # sockets need a short path
        self.token = folder / "token"
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        self.nodes: list[Node] = []
        self._gcs, self._dashboard = free_port(), free_port()
        self.address = f"{HEAD_ADDRESS}:{self._dashboard}"
        head = ["--head", "--port", str(self._gcs), "--ray-client-server-port", str(free_port())]
        head += ["--dashboard-host", HEAD_ADDRESS, "--dashboard-port", str(self._dashboard)]
        if growth is not None:
            head += ["--autoscaling-config", str(self._autoscaler(*growth))]
            env = (env or {}) | {
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            }
        self.head = self._start(HEAD_ADDRESS, cpus, head, env or {}, ())
        eventually(self._healthy, "the job server answers", every_s=0.5)

    def add_node(self, cpus: int, env: dict[str, str] | None = None, within: Sequence[str] = ()) -> Node:
        """Start one more node, with an address of its own; `within` is a command that runs its command."""
        node = self._start(
            f"127.0.0.{2 + len(self.nodes)}", cpus, ["--address", f"{HEAD_ADDRESS}:{self._gcs}"], env or {}, within
        )
        self.nodes.append(node)
        return node

    def await_nodes(self, count: int) -> None:
        """Return when the cluster has `count` living nodes."""

        def there() -> bool:
            for node in self.nodes:
                node.check()
            summary = json.loads(self.ask("/nodes?view=summary"))["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in summary) == count

        eventually(there, f"{count} nodes", every_s=0.5)

    def holder(self, title: str) -> Node:
        """The node that has the process `title`."""
        found: list[Node] = []

        def look() -> list[Node]:
            found[:] = [node for node in self.nodes if any(title in seen for seen in node.titles())]
            return found

        eventually(look, f"some node has {title}")
        return found[0]

    def ask(self, path: str) -> bytes:
        """What the job server answers to GET `path`."""
        request = urllib.request.Request(f"http://{self.address}{path}")
        request.add_header("Authorization", f"Bearer {self.token.read_text()}")
        return urllib.request.urlopen(request, timeout=30).read()

    def distill(self, log: Path, *args: str | Path) -> Ended:
        """`distill ARGS --address` of this cluster, with its token."""
        return distill(log, *args, *self.where, env=self.client_env)

    @property
    def where(self) -> tuple[str, str]:
        return ("--address", self.address)

    @property
    def client_env(self) -> dict[str, str]:
        return {"RAY_AUTH_TOKEN_PATH": str(self.token)}

    def end(self) -> None:
        for node in (*self.nodes, self.head):
            node.kill()
        shutil.rmtree(self.temp, ignore_errors=True)

    def _start(self, ip: str, cpus: int, args: Sequence[str], env: dict[str, str], within: Sequence[str]) -> Node:
        ports = (
            "--dashboard-agent-listen-port",
            "--dashboard-agent-grpc-port",
            "--runtime-env-agent-port",
            "--metrics-export-port",
        )
        own = [word for option in ports for word in (option, str(free_port()))]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        place = str(self.temp / ip)  # in a common one, two nodes that start at once would take the same sockets
        command = [*within, *ray, "--node-ip-address", ip, "--num-cpus", str(cpus), "--temp-dir", place, *own, *args]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "RAY"))}
        path = f"{Path(sys.executable).parent}:{plain['PATH']}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        without_us = {"PYTHONPATH": ""}  # the package has to travel
        return Node(command, plain | {"PATH": path} | without_us | auth | env, self.folder / f"node-{ip}.log")

    def _autoscaler(self, cpus: int, most: int) -> Path:
        """The file that an autoscaler is told by; its nodes are processes below that of the head."""
        nothing = ("auth", "docker", "file_mounts")
        lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
        lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
        head = {"resources": {}, "node_config": {}, "max_workers": 0}
        worker = {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most}
        config = {
            "cluster_name": "growing",
            "max_workers": most,
            "idle_timeout_minutes": 5,
            "provider": {
                "type": "external",  # "fake_multinode" would look for defaults that the wheel leaves out
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "gcs_address": f"{HEAD_ADDRESS}:{self._gcs}",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {"ray.head.default": head, "worker": worker},
        }
        file = self.folder / "autoscaler.yaml"
        file.write_text(json.dumps(config | {key: {} for key in nothing} | {key: [] for key in lists}))
        return file

    def _healthy(self) -> bool:
        self.head.check()
        try:
            urllib.request.urlopen(f"http://{self.address}/api/version", timeout=2)
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False
        return True


@contextlib.contextmanager
def cluster(
    folder: Path, cpus: int, env: dict[str, str] | None = None, growth: tuple[int, int] | None = None
) -> Iterator[Cluster]:
    """A running cluster; nothing of it is left when the block ends."""
    running = Cluster(folder, cpus, env, growth)
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def losing_replies(running: Cluster) -> Iterator[str]:
    """Address of a proxy for the job server that carries out submissions and never says so."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = urllib.request.Request(f"http://{running.address}{self.path}", body or None, method=self.command)
            for name, value in self.headers.items():
                request.add_header(name, value)
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    code, answer = reply.status, reply.read()
            except urllib.error.HTTPError as error:
                code, answer = error.code, error.read()
            if (self.command, self.path) == ("POST", "/api/jobs/"):
                lost.append(code)
                self.close_connection = True
                return
            self.send_response(code)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    lost: list[int] = []
    server = ThreadingHTTPServer((HEAD_ADDRESS, 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{HEAD_ADDRESS}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
    assert lost == [200], "one submission was carried out and its reply lost"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HEAD_ADDRESS, 0))
        return probe.getsockname()[1]
