"""The verbs for a job on this machine: run it, plan it, read its report."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import AsJson, JobFile, Overrides, Quiet, Storage, Verbose
from orchestrator.cli.usage import group

if TYPE_CHECKING:
    from orchestrator.plan.make import Plan

run_app = group()


@run_app.command()
def run(
    job: JobFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would do, as plan does.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run a job here, or continue it; finished stages are reused."""
    from orchestrator.plan.make import make_plan
    from orchestrator.spec.load import load_job

    plan = make_plan(load_job(job, overrides or []))
    if dry_run:
        _show_plan(plan, as_json)
        return
    from orchestrator.api import run as run_plan
    from orchestrator.runtime.noise import stdout_for_data

    with stdout_for_data():
        report = run_plan(plan)
    if as_json:
        print(json.dumps(report))
    else:
        from orchestrator.report.build import verdict

        print(verdict(report))
        if not quiet:
            folder = report["job_file"].rpartition("/")[0]
            print(f"to read the report: distill report {shlex.quote(folder)} --open", file=sys.stderr)


@run_app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    cluster: Annotated[str | None, typer.Option(help="What it would take there: 128xH100, or 16x8xH100 by nodes.")] = None,
    price: Annotated[float | None, typer.Option(help="Of one device for an hour, with --cluster.")] = None,
    tflops: Annotated[
        tuple[float, float] | None, typer.Option(help="Measured TFLOP/s of a device: training the student, labelling.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure these rates here first, with --cluster; half a minute.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Show what a job will do: stages, batch algebra, memory, label bytes, DeepSpeed configuration."""
    from orchestrator.errors import SpecError
    from orchestrator.plan.make import make_plan
    from orchestrator.spec.load import load_job

    if cluster is None and (price is not None or tflops or calibrate):
        given = "--price" if price is not None else "--tflops" if tflops else "--calibrate"
        raise SpecError(f"plan: {given} needs --cluster, for example --cluster 8xH100")
    if price is not None and not 0 <= price < float("inf"):
        raise SpecError(f"plan: --price must be 0 or more, got {price:g}")
    made = make_plan(load_job(job, overrides or []))
    if cluster is not None:
        from orchestrator.plan.capacity import capacity, check_measured_here, given_rates

        rates = given_rates(tflops) if tflops else None
        if calibrate:
            from orchestrator.runtime.machine import this_machine

            check_measured_here(made.job, cluster, [gpu.name for gpu in this_machine().gpus or ()])
            from orchestrator.calibration import calibrated
            from orchestrator.runtime.noise import stdout_for_data

            with stdout_for_data():
                rates = calibrated(made.job)
        print("\n".join(capacity(made, cluster, price, rates)))
        return
    _show_plan(made, as_json)


def _show_plan(plan: Plan, as_json: bool) -> None:
    """Print `plan` and what a run of it would meet here; raises the error that a run would end with at once."""
    from orchestrator.checks.check import check, explain_checked
    from orchestrator.plan.explain import as_dict, explain, explain_deepspeed

    checked = check(plan)
    if as_json:
        print(json.dumps(as_dict(plan) | {"findings": [finding.as_dict() for finding in checked.findings]}, indent=1))
    else:
        print("\n".join([explain(plan), "", *explain_checked(plan, checked), "", explain_deepspeed(plan)]))
    if plan.job.cluster.address == "local":
        checked.refuse()
    elif not as_json:
        print("(as seen from this machine; what the job reads is looked for again where it runs)")


@run_app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As tables of all keys, for readers.")] = False,
) -> None:
    """Print the JSON schema of a job file, for editors."""
    from orchestrator.spec.load import job_schema
    from orchestrator.spec.reference import reference_markdown

    if markdown:
        print(reference_markdown(), end="")
        return
    print(json.dumps(job_schema(), indent=1))


@run_app.command()
def report(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or name of a run (see --storage).")],
    storage: Storage = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open report.html in the browser instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the summary of a finished run, or open its report."""
    from orchestrator.errors import SpecError
    from orchestrator.report.browser import local_page, open_page
    from orchestrator.run_lookup import find_run

    directory = find_run(run_name, storage)
    name = "report.html" if open_it else "report.json" if as_json else "summary.md"
    try:
        if not open_it:
            print(directory.read(name).decode(), end="")
        elif not open_page(page := local_page(directory, name)):
            print(page)
    except FileNotFoundError:
        raise SpecError(f"{run_name}: has no {name} yet, because it has not finished; run the same job again") from None
