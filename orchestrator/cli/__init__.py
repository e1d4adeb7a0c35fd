"""The `distill` command. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.cluster import cluster_app
from orchestrator.cli.options import AsJson, JobFile, Overrides
from orchestrator.cli.runs import runs_app
from orchestrator.cli.stopped import say_stopped
from orchestrator.errors import DistillError, Terminated, find_user_error
from orchestrator.runtime.signals import heed_signals

app = typer.Typer(
    name="distill",
    help="Distil language models: a teacher pool writes soft labels, students learn from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
labels_app = typer.Typer(help="Look into a label log.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(labels_app, name="labels")
app.add_typer(cluster_app)
app.add_typer(runs_app)
dashboards_app = typer.Typer(help="Watch runs in Grafana.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(dashboards_app, name="dashboards")


@app.command()
def run(job: JobFile, overrides: Overrides = None, as_json: AsJson = False, dry_run: bool = False) -> None:
    """Run a job here, or continue it; finished stages are reused."""
    from orchestrator.plan.explain import explain
    from orchestrator.plan.make import make_plan
    from orchestrator.spec.load import load_job

    plan = make_plan(load_job(job, overrides or []))
    if dry_run:
        print(explain(plan))
        return
    from orchestrator.api import run as run_plan

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
        report = run_plan(plan)
    if as_json:
        print(json.dumps(report))
    else:
        from orchestrator.report.build import verdict

        print(verdict(report))


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    cluster: Annotated[str | None, typer.Option(help="What it would take there: 128xH100, or 16x8xH100 by nodes.")] = None,
    price: Annotated[float | None, typer.Option(help="Of one device for an hour, with --cluster.")] = None,
    tflops: Annotated[
        tuple[float, float] | None, typer.Option(help="Measured TFLOP/s of a device: training the student, labelling.")
    ] = None,
    calibrate: Annotated[bool, typer.Option(help="Measure these rates here first, with --cluster; half a minute.")] = False,
) -> None:
    """Show what a job will do: stages, batch algebra, memory, label bytes, DeepSpeed configuration."""
    from orchestrator.plan.explain import as_dict, explain
    from orchestrator.plan.make import make_plan
    from orchestrator.spec.load import load_job

    made = make_plan(load_job(job, overrides or []))
    if cluster is not None:
        from orchestrator.plan.capacity import capacity, given_rates

        rates = given_rates(tflops) if tflops else None
        if calibrate:
            from orchestrator.calibration import calibrated

            with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints to stdout
                rates = calibrated(made.job)
        print("\n".join(capacity(made, cluster, price, rates)))
        return
    print(json.dumps(as_dict(made), indent=1) if as_json else explain(made))


@app.command()
def schema() -> None:
    """Print the JSON schema of a job file, for editors."""
    from orchestrator.spec.load import job_schema

    print(json.dumps(job_schema(), indent=1))


@app.command()
def report(
    run_directory: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")], as_json: AsJson = False
) -> None:
    """Print the summary of a finished run."""
    from orchestrator.errors import SpecError
    from orchestrator.store.files import open_store

    name = "report.json" if as_json else "summary.md"
    try:
        print(open_store(run_directory).read(name).decode(), end="")
    except FileNotFoundError:
        raise SpecError(f"{run_directory}: no {name} there; the run has not finished or is elsewhere") from None


@labels_app.command("inspect")
def labels_inspect(
    path: Annotated[str, typer.Argument(help="Label log: STORAGE/labels/KEY.")], as_json: AsJson = False
) -> None:
    """Show what a label log holds, what each column costs, and the entropy of what is in it."""
    from dataclasses import asdict

    from orchestrator.labels.inspect import label_costs

    log = _open_log(path)
    shards = [(s, r) for s, r in log.all_committed()]
    rows, size = sum(r.rows for _, r in shards), sum(r.bytes for _, r in shards)
    facts: dict[str, Any] = {"key": log.key, "shards": len(shards), "rows": rows, "bytes": size, "identity": log.identity()}
    costs = label_costs(log)
    facts["bytes_per_token"] = asdict(costs)
    if as_json:
        print(json.dumps(facts))
    else:
        print(f"{log.key}: {len(shards)} shards, {rows:,} rows, {size:,} bytes")
        print(json.dumps(facts["identity"], indent=1))
        print("bytes per token:")
        for name, value in costs.columns.items():
            print(f"  {value:9.3f}  {name}")
        for name, value in costs.bounds.items():
            print(f"  {value:9.3f}  entropy bound of {name}")
        for name, value in costs.unique_ids.items():
            print(f"  {value:9.2f}  unique ids at temperature {name}")


@labels_app.command("verify")
def labels_verify(path: Annotated[str, typer.Argument(help="Label log: STORAGE/labels/KEY.")]) -> None:
    """Read every shard of a label log and check every byte; exit code 5 names the first damaged shard."""
    found = _open_log(path).verify()
    print(f"{len(found)} shards, {sum(r.rows for _, r in found):,} rows: intact")


@dashboards_app.command("install")
def dashboards_install(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; what an earlier version wrote is replaced.")],
    discovery: Annotated[Path | None, typer.Option(help="Ray's list of nodes, as Prometheus will see the file.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="Address of Prometheus, as Grafana will see it.")] = None,
) -> None:
    """Write Grafana's dashboards and provisioning, and Prometheus' configuration and alert rules."""
    from orchestrator.monitoring.install import DISCOVERY, PROMETHEUS_URL, install

    for path in install(folder, discovery or DISCOVERY, prometheus or PROMETHEUS_URL):
        print(path)


def _open_log(path: str) -> Any:
    from orchestrator.errors import SpecError
    from orchestrator.store.files import open_store
    from orchestrator.store.label_log import LabelLog

    address = open_store(path).address()
    root, _, key = address.rpartition("/labels/")
    if not root or "/" in key or not open_store(address).exists("key.json"):
        raise SpecError(f"{path}: not a label log (STORAGE/labels/KEY)")
    return LabelLog(open_store(root), key)


def main() -> None:
    """Run the command and end with the exit code that the contract gives its outcome."""
    heed_signals()
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of a KeyboardInterrupt
            say_stopped("interrupted", sys.argv[1:])
        sys.exit(code)
    except Terminated:
        say_stopped("terminated", sys.argv[1:])
        sys.exit(143)
    except Exception as error:
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Print `error` as a user should see it; returns the exit code."""
    import click

    if isinstance(error, click.ClickException):
        print(f"distill: {error.format_message()}", file=sys.stderr)
        return 2
    known: DistillError | None = find_user_error(error)
    if known is None and "ray" in sys.modules:
        from orchestrator.errors import ResumableError
        from orchestrator.runtime.session import lost_cluster

        known = ResumableError(f"cluster lost; run the same job again to resume: {error}") if lost_cluster(error) else None
    if known is None:
        traceback.print_exception(error)
        return 1
    print(f"distill: {known}", file=sys.stderr)
    return known.exit_code
