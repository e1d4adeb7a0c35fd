"""The verbs of the command for Python programs: load a job, plan it, run it here or submit it to a cluster; sweep, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.plan.make import Plan
from orchestrator.plan.make import make_plan as plan
from orchestrator.runtime.environment import prepare_ray
from orchestrator.spec.load import load_job
from orchestrator.submit import submit

if TYPE_CHECKING:
    from orchestrator.sweep import Ran

__all__ = ["compare", "load_job", "plan", "run", "submit", "sweep"]


def run(plan: Plan) -> dict[str, Any]:
    """Run `plan` to its end, or continue where an earlier run of it stopped; returns the report (report.json).

    Raises a `DistillError` for whatever a user can mend.
    """
    prepare_ray(local=plan.job.cluster.address == "local")  # before Ray is imported
    from orchestrator.pipeline import run as run_plan

    return run_plan(plan)


def sweep(job: str | Path, grid: Mapping[str, Sequence[Any]], overrides: Sequence[str] = ()) -> list[Ran]:
    """Run the job file `job` at every point of `grid` (values by dotted key), one after another on one Ray.

    `overrides` (`a.b=c`) hold for all points. What the points have in common is made once; a sweep that broke off continues.
    A point that fails with a `DistillError` carries it in `Ran.error`, and the others are run all the same. Raises `SpecError`,
    before anything is started, for a point that cannot be run.
    """
    from orchestrator.sweep import points, run_points

    found = points(job, grid, overrides)
    prepare_ray(local=found[0].plan.job.cluster.address == "local")  # before Ray is imported
    return run_points(found)


def compare(runs: Sequence[str], storage: str | None = None, page: str | Path | None = None) -> dict[str, Any]:
    """Compare `runs` (run directories, or names of runs in `storage`) and return the data that `distill compare --json` prints.

    Writes the page to `page`, if that is given. Raises `SpecError` for a run that is not there.
    """
    from orchestrator.compare.groups import compared
    from orchestrator.compare.page import write_page
    from orchestrator.compare.read import read_runs
    from orchestrator.compare.table import as_dict

    comparison = compared(read_runs(runs, storage))
    if page is not None:
        write_page(comparison, Path(page))
    return as_dict(comparison)
