"""Checks of the cores, GPUs, memory and disk that a job needs against those of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.checks.finding import Finding
from orchestrator.errors import EnvironmentFault
from orchestrator.plan.footprint import CPU_PROCESS
from orchestrator.plan.make import Plan, Training
from orchestrator.plan.resources import Resources, evaluation_takes, replica_takes, training_takes
from orchestrator.runtime.environment import ray_temp_folder
from orchestrator.runtime.machine import Machine
from orchestrator.spec.job import Job
from orchestrator.spec.model import PretrainTeacher, labelled_by
from orchestrator.spec.train import Train

SOCKET_NAME = f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
SOCKET_BYTES = 107
"""Longest path of a Unix socket (unix(7)), its end not counted."""
CHECKPOINT_BYTES = 2 * 16
"""Per parameter: weights, master weights and AdamW's moments, of the newest checkpoint and the one before."""


def machine_findings(plan: Plan, machine: Machine) -> Iterator[Finding]:
    """Yield findings if a local Ray on `machine` cannot hold the workers of `plan`."""
    yield from _gpus(plan.job, machine)
    yield from _cores(plan, machine)
    yield from _memory(plan, machine)
    yield from _disk(plan)
    yield from _sockets()


def _askers(job: Job) -> dict[str, Resources]:
    """Return the resources that each part of a run takes, by the key of the job file that sets them."""
    found = {"teacher.replicas": {k: job.teacher.replicas.min * v for k, v in replica_takes(job.teacher).items()}}
    if isinstance(job.teacher, PretrainTeacher):
        found["teacher.train"] = training_takes(job.teacher.train)
    return found | {"train": training_takes(job.train)}


def _gpus(job: Job, machine: Machine) -> Iterator[Finding]:
    if machine.gpus is None:
        return
    asked, have = {key: takes["GPU"] for key, takes in _askers(job).items()}, len(machine.gpus)
    together = asked["train"] + asked["teacher.replicas"]
    most = max(together, asked.get("teacher.train", 0.0), evaluation_takes(job)["GPU"])
    if not most:
        return
    if most > have:
        name = max(asked, key=lambda key: asked[key])
        key = {"teacher.replicas": "teacher.gpus_per_shard"}.get(name, f"{name}.gpus_per_worker")
        there = f"has {have}" if have else "has none"
        yield Finding(
            f"{key}: {most:g} GPU{'s' if most > 1 else ''} asked for at once, but this machine {there}; set it to 0 to compute "
            "on cores, or cluster.address to a cluster that has them",
            EnvironmentFault,
        )
    elif (build := _torch_build()).endswith("+cpu"):
        yield Finding(
            f"torch: {build} is a build without CUDA, but the job asks for GPUs; install one with it", EnvironmentFault
        )


def _torch_build() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _cores(plan: Plan, machine: Machine) -> Iterator[Finding]:
    """Ray's slots are numbers: more of them than cores are had for the asking, but not the cores."""
    job = plan.job
    asked = {key: takes["CPU"] for key, takes in _askers(job).items()}
    together = asked["train"] + asked["teacher.replicas"]
    most = max(together, asked.get("teacher.train", 0.0))
    given = job.cluster.num_cpus
    if given is not None and most > given:
        what = "teacher pool and student" if most == together else "teacher.train"
        yield Finding(f"cluster.num_cpus: {what} need {most:g} CPU at once, the cluster has {given}", EnvironmentFault)
    elif most > machine.cores:
        name = max(asked, key=lambda key: asked[key])
        key = "teacher.replicas.min" if name == "teacher.replicas" else f"{name}.workers"
        yield Finding(
            f"{key}: {_crew(job, most == together)} want {most:g} cores at once, this machine has {machine.cores}: they take "
            "turns, and fewer are no slower"
        )


def _crew(job: Job, side_by_side: bool) -> str:
    train = job.train if side_by_side or not isinstance(job.teacher, PretrainTeacher) else job.teacher.train
    workers = f"{train.workers} worker{'s' if train.workers > 1 else ''}"
    replicas = job.teacher.replicas.min
    return f"{workers} and {replicas} teacher replica{'s' if replicas > 1 else ''}" if side_by_side else workers


def _memory(plan: Plan, machine: Machine) -> Iterator[Finding]:
    """States are held in any case; what passes through is an estimate."""
    job = plan.job
    sides = [("train", _needs(plan.student, job.train), _teachers(plan))]
    if plan.teacher is not None and isinstance(job.teacher, PretrainTeacher):
        sides.append(("teacher.train", _needs(plan.teacher, job.teacher.train), 0))
    for section, (states, whole), beside in sides:
        if states + beside > machine.memory:
            yield Finding(
                f"{section}: weights, gradients and optimizer states of all workers take {_gib(states + beside)}, this machine "
                f"has {_gib(machine.memory)}; a smaller model or fewer workers",
                EnvironmentFault,
            )
        elif whole + beside > machine.free_memory:
            yield Finding(
                f"{section}: about {_gib(whole + beside)} needed at once, {_gib(machine.free_memory)} of this machine's memory "
                f"are free; a smaller {section}.micro_batch or fewer {section}.workers"
            )
        yield from _gpu_memory(section, plan.student if section == "train" else plan.teacher, machine)


def _needs(training: Training, train: Train) -> tuple[int, int]:
    """Bytes of the machine's memory that all workers hold: states alone, and in all. 0 where the model is not known."""
    m = training.memory
    if m is None:
        return 0, 0
    if train.gpus_per_worker:
        return train.workers * m.host, train.workers * (m.host + CPU_PROCESS)
    return train.workers * (m.weights + m.gradients + m.optimizer), train.workers * m.total


def _teachers(plan: Plan) -> int:
    """Bytes of the weights of the replicas that label on cores."""
    spec = labelled_by(plan.job.teacher)
    if spec.gpus_per_shard or plan.teacher_params is None or spec is not plan.job.teacher:
        return 0
    return spec.replicas.min * plan.teacher_params * (4 if spec.dtype == "fp32" else 2)


def _gpu_memory(section: str, training: Training | None, machine: Machine) -> Iterator[Finding]:
    sizes = [gpu.memory for gpu in machine.gpus or () if gpu.memory is not None]
    need = training.memory if training and training.on_gpu else None
    if need and sizes and need.total > min(sizes):
        yield Finding(
            f"{section}: a worker needs about {_gib(need.total)}, a GPU has {_gib(min(sizes))}; {section}.parallel.stage, "
            f"{section}.activation_checkpointing and a smaller {section}.micro_batch save memory"
        )


def _disk(plan: Plan) -> Iterator[Finding]:
    if "://" in plan.storage:
        return
    place = Path(plan.storage).absolute()
    while not place.exists():
        place = place.parent
    size, _, free = shutil.disk_usage(place)
    if not size:  # no file system to keep files in, as /proc; whether it can be written is tried when the run begins
        return
    sides = [(plan.student.params or 0, plan.job.train)] * (2 if plan.job.evaluate.baseline else 1)
    if plan.teacher is not None and isinstance(plan.job.teacher, PretrainTeacher):
        sides.append((plan.teacher.params or 0, plan.job.teacher.train))
    models = sum(params * (4 if train.precision == "fp32" else 2) for params, train in sides)
    need = CHECKPOINT_BYTES * sum(params for params, _ in sides) + (plan.label_bytes_at_most or 0)
    begun = any((Path(plan.storage) / stage).exists() for stage in ("teacher", "student"))  # some of it may be there already
    if models > free and not begun:
        yield Finding(
            f"storage: disk full: the trained models take {_gib(models)}, {plan.storage} has {_gib(free)} free; take another",
            EnvironmentFault,
        )
    elif models + need > free:
        yield Finding(
            f"storage: labels and checkpoints take up to {_gib(models + need)}, {plan.storage} has {_gib(free)} free; "
            "delete old runs, or name a larger disk"
        )


def _sockets() -> Iterator[Finding]:
    folder = ray_temp_folder()
    if len((folder + SOCKET_NAME).encode()) > SOCKET_BYTES:
        most = SOCKET_BYTES - len(SOCKET_NAME)
        yield Finding(
            f"TMPDIR: {folder} has {len(folder.encode())} characters, too long for Ray's sockets, which allow {most}; "
            "set RAY_TMPDIR=/tmp",
            EnvironmentFault,
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
