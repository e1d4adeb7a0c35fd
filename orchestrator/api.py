"""The verbs of the command for Python programs: load a job, plan it, run it here or submit it to a cluster."""

from orchestrator.pipeline import run
from orchestrator.plan.make import make_plan as plan
from orchestrator.spec.load import load_job
from orchestrator.submit import submit

__all__ = ["load_job", "plan", "run", "submit"]
