"""The verbs of the command for Python programs: load a job, plan it, run it here or submit it to a cluster."""

from __future__ import annotations

from typing import Any

from orchestrator.plan.make import Plan
from orchestrator.plan.make import make_plan as plan
from orchestrator.runtime.environment import prepare_ray
from orchestrator.spec.load import load_job
from orchestrator.submit import submit

__all__ = ["load_job", "plan", "run", "submit"]


def run(plan: Plan) -> dict[str, Any]:
    """Run `plan` to its end, or continue where an earlier run of it stopped; returns the report (report.json).

    Raises a `DistillError` for whatever a user can mend.
    """
    prepare_ray(local=plan.job.cluster.address == "local")  # before Ray is imported
    from orchestrator.pipeline import run as run_plan

    return run_plan(plan)
