"""Training on the cluster: a Ray Train worker group, restarted when a worker dies."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import DEFAULT_WORKER_GROUP_START_TIMEOUT_S as START_S

from orchestrator.errors import EnvironmentFault, ResumableError, one_line
from orchestrator.faults import RETRIED, Fault, diagnose
from orchestrator.store.files import HeldElsewhere, Lock, StillOurs, Store
from orchestrator.store.once import Made, Waiting, make_once
from orchestrator.store.records import ModelFolder, finished_model
from orchestrator.student.job import TrainingJob, checkpoint_steps
from orchestrator.tracking import names


@dataclass(frozen=True)
class Host:
    """The run that a training belongs to, as far as it needs to know it."""

    store: Store
    board: Any
    tokenizer_folder: str
    say: Callable[[str], None]
    warn: Callable[[str], None]


def train_model(host: Host, job: TrainingJob, awaits_room: Callable[[], bool] = lambda: False) -> Made[ModelFolder]:
    """Train `job`, or continue it from its newest checkpoint. If another run is training the same, wait for its result.

    While `awaits_room` is true, the workers wait for room on the cluster without a limit. Raises what the training itself
    raised, `EnvironmentFault` if there is no room for its workers, and `ResumableError` once they have failed more often in a
    row than `train.max_restarts` allows. Restarts are counted here and not in Ray Train, which cannot tell a user's error
    from a dead worker, and keeps its own checkpoints; ours are found again by any later run.
    """

    lock_key = f"{job.folder}/lock"

    def aborted() -> str | None:
        return ray.get(host.board.aborted.remote())

    def train(lock: Lock) -> ModelFolder:
        _until_done(host, job, HeldElsewhere(host.store, lock_key, lock.token), awaits_room, aborted)
        lock()
        model = finished_model(host.store, job.folder)
        assert model is not None
        return model

    waiting = Waiting(lambda text: host.say(f"{job.stage}: {text}"), aborted)
    return make_once(host.store, lock_key, lambda: finished_model(host.store, job.folder), train, waiting)


def _until_done(
    host: Host, job: TrainingJob, still_ours: StillOurs, awaits_room: Callable[[], bool], aborted: Callable[[], str | None]
) -> None:
    """Start the worker group, and again after each failure that another attempt may mend.

    A new checkpoint renews the budget of such failures: a week on a thousand devices meets many.
    """
    config = {"store": host.store, "job": job, "board": host.board, "tokenizer_folder": host.tokenizer_folder}
    config["still_ours"] = still_ours
    failures, reached = 0, _newest_step(host.store, job)
    while True:
        patient = awaits_room()
        try:
            return _fit(job, config)
        except Exception as error:
            fault, cause = diagnose(error, alone=job.train.workers == 1)
            if fault is Fault.NO_ROOM and patient and not aborted():
                continue
            if not RETRIED[fault]:
                raise (_no_room(job) if fault is Fault.NO_ROOM else cause) from error
            told = f"{fault.value}: {one_line(str(cause))}"
            reason = aborted()
            if reason:
                raise ResumableError(f"{job.stage}: the run is ending ({reason}), and {told}") from error
            now = _newest_step(host.store, job)
            failures, reached = (1 if now > reached else failures + 1), now
            if failures > job.train.max_restarts:
                raise ResumableError(f"{job.stage}: failed {failures} times without getting past step {now}; {told}") from error
            host.warn(f"{job.stage}: {told}; retry {failures}/{job.train.max_restarts} from step {now}")
            host.board.post.remote(names.stage_id(job.stage, job.key), [(0, {names.RESTARTS: 1.0})])


def _newest_step(store: Store, job: TrainingJob) -> int:
    return max(checkpoint_steps(store, f"{job.folder}/checkpoints"), default=0)


def _no_room(job: TrainingJob) -> EnvironmentFault:
    train, free = job.train, ray.available_resources()
    return EnvironmentFault(
        f"{job.stage}: no room for {train.workers} workers of {train.cpus_per_worker:g} CPU and {train.gpus_per_worker:g} GPU "
        f"each in {train.placement_timeout_s:g} s; free are {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"
    )


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
