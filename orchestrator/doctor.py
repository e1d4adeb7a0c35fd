"""Checks of what a run would find on this machine and on the cluster that it would join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from orchestrator.checks.check import check
from orchestrator.errors import DistillError, EnvironmentFault
from orchestrator.plan.make import UNKNOWN_VOCABULARY, Plan, make_plan, vocabulary
from orchestrator.runtime.environment import ray_token, tracking_uri
from orchestrator.runtime.machine import this_machine
from orchestrator.runtime.session import knock, ray_session
from orchestrator.runtime.versions import PACKAGES, versions
from orchestrator.spec.job import Job
from orchestrator.store.files import open_store
from orchestrator.submit import connect
from orchestrator.tracking.mlflow_tracker import redact

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class Finding:
    what: str
    fine: bool
    detail: str


def examine(job: Job | None) -> Iterator[Finding]:
    """Look at this machine and, given a job, at what it needs: storage, tracking server, all nodes of its cluster."""
    yield look("packages", _packages)
    yield look("devices", _devices)
    yield look("token", _token)
    uri = (job.tracking.uri if job else None) or tracking_uri()
    if uri is not None:
        yield look("tracking", lambda: _tracking(uri))
    if job is not None:
        plan = make_plan(job)
        for found in check(plan).findings:
            said = found.text.removeprefix(f"{found.key}: ")
            yield Finding(found.key, found.refusal is None, said if found.refusal else f"warning: {said}")
        yield look("models", lambda: _models(job))
        yield look("storage", lambda: _storage(plan))
        if job.cluster.address != "local":
            yield look("nodes", lambda: _nodes(plan))


def examine_server(address: str) -> Finding:
    """Check that the job server at `address` answers and accepts our token."""
    return look("ray", lambda: f"{len(connect(address).submissions())} runs known at {address}")


def look(what: str, check: Callable[[], str]) -> Finding:
    """Return a finding with the message of `check`, or with the user error that it raises."""
    try:
        return Finding(what, True, check())
    except DistillError as error:
        return Finding(what, False, str(error))


def _packages() -> str:
    found = versions()
    missing = [package for package in PACKAGES[1:] if package not in found]  # the first may run from its source
    if missing:
        raise EnvironmentFault(f"not installed: {', '.join(missing)}")
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _devices() -> str:
    machine = this_machine()
    gpus = [gpu.name for gpu in machine.gpus or ()]
    return ", ".join([f"{machine.cores} cores", f"{machine.memory / 2**30:.0f} GiB of memory", *(gpus or ["no GPU"])])


def _token() -> str:
    token = ray_token()
    if token is None:
        return "RAY_AUTH_MODE is not token: whoever reaches the cluster's ports can run code on it"
    if isinstance(token, str):
        return f"from ${token}"
    if not token.exists():
        return f"none yet; a local Ray gets one in {token}, for a cluster put its token there"
    mode = token.stat().st_mode & 0o777
    return f"{token}, mode {mode:o}" + (f"; others can read it: chmod 600 {token}" if mode & 0o077 else "")


def _tracking(uri: str) -> str:
    address = urlsplit(uri)
    kind = address.scheme.partition("+")[0]
    if address.hostname and (address.port or kind in PORTS):
        try:
            knock(address.hostname, address.port or PORTS[kind])
        except OSError as error:
            raise EnvironmentFault(f"tracking.uri: nobody answers at {redact(uri)}: {error}") from error
    return redact(uri)


def _models(job: Job) -> str:
    from orchestrator.student.preflight import check_models

    check_models(job, vocabulary(job) or UNKNOWN_VOCABULARY)
    return "can be built and trained as asked"


def _storage(plan: Plan) -> str:
    open_store(plan.storage).check_writable()
    return f"{plan.storage} can be written"


def _nodes(plan: Plan) -> str:
    with ray_session(plan.job.cluster, plan.cpu_slots):
        from orchestrator.runtime.nodes import alive_nodes, check_nodes

        check_nodes(open_store(plan.storage), plan.storage)
        return "; ".join(
            f"{node.name} " + " ".join(f"{node.resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            for node in alive_nodes()
        )
