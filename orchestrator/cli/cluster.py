"""The verbs for clusters: submit a run, watch it, stop it, and look whether everything is there that it needs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import AsJson, JobFile, Overrides, Quiet, Verbose
from orchestrator.cli.usage import group
from orchestrator.errors import EnvironmentFault, SpecError

if TYPE_CHECKING:
    from orchestrator.runtime.jobs import JobServer, Submission

WATCH_EVERY_S = 5.0

cluster_app = group()

Address = Annotated[
    str | None, typer.Option(help="Ray's job server, host:port or URL; default: $RAY_API_SERVER_ADDRESS, or this machine's.")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a submission, or name of a run for its newest.")]


@cluster_app.command()
def submit(
    job: JobFile,
    overrides: Overrides = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run and end with its exit code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a job on a cluster, or continue it there; the same again while it runs changes nothing."""
    from orchestrator.submit import connect, portable_job

    portable = portable_job(job, overrides or [])
    server = connect(address)
    submission, new = server.submit(portable)
    print(f"{submission.id} " + ("submitted" if new else "is going on already"), file=sys.stderr)
    print(json.dumps(asdict(submission)) if as_json else submission.id, flush=True)
    if wait:
        _follow(server, submission.id, sys.stderr.write)


@cluster_app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[ID]", help="As for logs; the newest of all if left out.")] = None,
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Until the run ends; then its exit code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a submitted run is doing: its state, and the newest line it has written."""
    server = _connect(address)
    submission = server.find(name) if name is not None else _newest(server)
    shown = None
    with _interruptible(server, submission.id):
        while True:
            last = server.logs(submission.id).rstrip().rpartition("\n")[2]
            if as_json:
                print(json.dumps(asdict(submission) | {"last_line": last}), flush=True)
            elif shown != (shown := (submission.status, last)):
                print(f"{_line(submission)}\n  {last}", flush=True)
            if not watch or submission.ended:
                break
            time.sleep(WATCH_EVERY_S)
            submission = server.state(submission.id)
    if watch and submission.exit_code:
        raise typer.Exit(submission.exit_code)


@cluster_app.command()
def logs(
    name: Id,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run ends; then its exit code.")] = False,
) -> None:
    """Print what a submitted run has written."""
    server = _connect(address)
    submission = server.find(name)
    if follow:
        _follow(server, submission.id, sys.stdout.write)
    else:
        print(server.logs(submission.id), end="")


@cluster_app.command()
def stop(name: Id, address: Address = None) -> None:
    """Stop a submitted run; submitting it again continues it."""
    server = _connect(address)
    submission = server.find(name)
    print(_line(submission if submission.ended else server.stop(submission.id)))


@cluster_app.command("list")
def list_(address: Address = None, as_json: AsJson = False) -> None:
    """List the runs that a cluster knows, oldest first."""
    known = _connect(address).submissions()
    if as_json:
        print(json.dumps([asdict(submission) for submission in known]))
    else:
        print("".join(f"{_line(submission)}\n" for submission in known), end="")


@cluster_app.command()
def doctor(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB]", help="Look at what this job needs, too.")] = None,
    overrides: Overrides = None,
    address: Address = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Say what is there and what is missing; with --address, on that cluster too. Exit code 4 if something is missing."""
    from orchestrator.doctor import Finding, examine, examine_server
    from orchestrator.spec.load import load_job
    from orchestrator.submit import connect, portable_job

    missing: list[str] = []

    def show(finding: Finding) -> None:
        print(f"{'ok' if finding.fine else 'MISSING':<8} {finding.what:<9} {finding.detail}", flush=True)
        missing.extend([] if finding.fine else [finding.what])

    for finding in examine(load_job(job, overrides or []) if job and not address else None):
        show(finding)
    if address:
        show(examine_server(address))
    if missing:
        raise EnvironmentFault(f"missing: {', '.join(missing)}")
    if address and job:  # what the cluster sees, only the cluster can say
        server = connect(address)
        _follow(server, server.examine(portable_job(job, overrides or [])), sys.stdout.write)


def _connect(address: str | None) -> JobServer:
    from orchestrator.submit import connect

    return connect(address)


def _newest(server: JobServer) -> Submission:
    known = server.submissions()
    if not known:
        raise SpecError(f"nothing was submitted to {server.url}")
    return known[-1]


def _follow(server: JobServer, submission_id: str, write: Callable[[str], object]) -> None:
    """Hand over what the run writes; end with its exit code."""
    with _interruptible(server, submission_id):
        ended = server.follow(submission_id, write)
    print(_line(ended), file=sys.stderr)
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


@contextmanager
def _interruptible(server: JobServer, submission_id: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not what is watched."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{submission_id} goes on; to end it: distill stop {submission_id} --address {server.url}", file=sys.stderr)
        raise typer.Exit(130) from None


def _line(submission: Submission) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(submission.started_s))
    seconds = (submission.ended_s or time.time()) - submission.started_s
    code = f"  exit code {submission.exit_code}" if submission.exit_code else ""
    return f"{submission.id}  {submission.status}  since {began}, {seconds:,.0f} s{code}"
