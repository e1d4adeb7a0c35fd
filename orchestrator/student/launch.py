"""Training on the cluster: a Ray Train worker group, restarted when a worker dies."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import DEFAULT_WORKER_GROUP_START_TIMEOUT_S as START_S
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from orchestrator.errors import BROKEN_LINK, EnvironmentFault, ResumableError, find_user_error
from orchestrator.store.files import HeldElsewhere, Store
from orchestrator.store.records import ModelFolder, finished_model
from orchestrator.student.job import TrainingJob
from orchestrator.tracking import names


def train_model(store: Store, job: TrainingJob, board: Any, tokenizer_folder: str, warn: Callable[[str], None]) -> ModelFolder:
    """Train `job`, or continue it from its newest checkpoint; returns the finished model.

    Raises what the training itself raised, `EnvironmentFault` if there is no room for its workers, and `ResumableError` once
    they have died more often than `train.max_restarts` allows. Restarts are counted here and not in Ray Train, which cannot
    tell a user's error from a dead worker, and keeps its own checkpoints; ours are found again by any later run.
    """
    config = {"store": store, "job": job, "board": board, "tokenizer_folder": tokenizer_folder}
    lock_key = f"{job.folder}/lock"
    with store.exclusive(lock_key) as lock:
        config["still_ours"] = HeldElsewhere(store, lock_key, lock.token)
        for attempt in range(job.train.max_restarts + 1):
            try:
                _fit(job, config)
                break
            except Exception as error:
                final = find_user_error(error) or _no_room(error, job) or _programming_error(error, job.train.workers == 1)
                if final is not None:
                    raise final from error
                aborted: str | None = ray.get(board.aborted.remote())
                if aborted:
                    raise ResumableError(f"{job.stage}: a training worker died, and the run is ending: {aborted}") from error
                if attempt == job.train.max_restarts:
                    raise ResumableError(f"{job.stage}: training workers died {attempt + 1} times: {error}") from error
                warn(f"{job.stage}: a training worker died; retry {attempt + 1}/{job.train.max_restarts}")
                board.post.remote(names.stage_id(job.stage, job.key), [(0, {names.RESTARTS: 1.0})])
    model = finished_model(store, job.folder)
    assert model is not None
    return model


def _no_room(error: Exception, job: TrainingJob) -> EnvironmentFault | None:
    """What to say where workers never started, because the cluster had no room for them."""
    if not isinstance(error, ControllerError) or not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
        return None
    train, free = job.train, ray.available_resources()
    return EnvironmentFault(
        f"{job.stage}: no room for {train.workers} workers of {train.cpus_per_worker:g} CPU and {train.gpus_per_worker:g} GPU "
        f"each in {train.placement_timeout_s:g} s; free are {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
    )


def _programming_error(error: Exception, alone: bool) -> Exception | None:
    """The exception of a worker that trying again would only repeat.

    A worker that died is reported by an exception of Ray's, and to its neighbours, if it was not `alone`, as a broken
    connection, which torch raises as a RuntimeError that says so. Whatever else a worker raised is a bug.
    """
    failures: list[Exception] = list(getattr(error, "worker_failures", {}).values())
    raised = [e for e in failures if not type(e).__module__.startswith("ray.")]
    bugs = [e for e in raised if alone or not (isinstance(e, RuntimeError) and BROKEN_LINK.search(str(e)))]
    return bugs[0] if bugs else None


def _fit(job: TrainingJob, config: dict[str, Any]) -> None:
    train = job.train
    starts = math.ceil(train.placement_timeout_s / START_S)
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
    with TemporaryDirectory(prefix="distill-ray-", ignore_cleanup_errors=True) as unused:  # nothing is reported to Ray Train
        TorchTrainer(
            _worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=train.workers, use_gpu=train.gpus_per_worker > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
            run_config=RunConfig(
                name=f"{job.stage}-{job.key[:8]}-{uuid.uuid4().hex[:6]}",
                storage_path=unused,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=starts - 1),
            ),
        ).fit()


def _worker(config: dict[str, Any]) -> None:
    # Imported here so that the driver, which only names this function, does not load DeepSpeed and transformers.
    from orchestrator.student.worker import run_worker

    run_worker(**config)
