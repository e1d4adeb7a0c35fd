"""The only reader and writer of environment variables."""

from __future__ import annotations

import os


def limit_threads(count: int) -> None:
    """Keep this process to `count` threads of computation; numerics on CPU depend on it, so it is never ambient."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"


def prepare_deepspeed(on_gpu: bool) -> None:
    """Settings that DeepSpeed reads while it is imported."""
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Engine checkpoints are pickles: only tensors and the types listed in student.checkpoint are let through.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def lone_process() -> None:
    """What a launcher would have set for a group of this process alone."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def tracking_uri() -> str | None:
    """The MLflow address a user has set for everything on this machine."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def prepare_ray(local: bool) -> None:
    """Settings that Ray reads while it is imported or started."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if local else "token")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if local:
        # One process less to start; nobody announces the preemption of a laptop.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def job_tags() -> dict[str, str]:
    """Tags that lead from a tracked run back to the Ray job it ran in."""
    submission = os.environ.get("RAY_JOB_SUBMISSION_ID")
    return {"ray.submission_id": submission} if submission else {}
