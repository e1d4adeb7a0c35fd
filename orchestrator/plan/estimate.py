"""Cost of a training on a cluster: whether it fits, how long it takes, how many devices teach, and what to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.errors import SpecError
from orchestrator.plan.cluster import Calibration, Cluster
from orchestrator.plan.footprint import CPU_PROCESS, GPU_PROCESS, Footprint, Rows, footprint
from orchestrator.plan.layout import Layout
from orchestrator.plan.memory import head_rows
from orchestrator.plan.sizes import Decoder
from orchestrator.plan.speed import Speed, teacher_speed, training_speed

ROOM = 0.95
"""Share of a device's memory that may be planned with; the rest goes to fragmentation."""


@dataclass(frozen=True)
class Workload:
    """A distillation as far as its cost goes."""

    student: Decoder
    teacher: Decoder
    seq_len: int
    micro_rows: int
    global_rows: int
    steps: int
    label_bytes_per_token: float
    teacher_precision: Literal["fp32", "bf16"] = "bf16"
    teacher_rows: int = 8
    """Rows in one forward pass of the teacher."""

    @property
    def tokens(self) -> int:
        return self.steps * self.global_rows * self.seq_len

    def rows(self, layout: Layout) -> Rows | None:
        """Return the rows that one replica processes in a step; None where the batch does not divide among `layout.data`."""
        share, rest = divmod(self.global_rows, layout.data)
        if rest or not share:
            return None
        micro = min(self.micro_rows, share)
        batches, rest = divmod(share, micro)
        if rest or (layout.schedule == "dualpipev" and batches < layout.parts):
            return None
        return Rows(micro, batches, self.seq_len)


@dataclass(frozen=True)
class Estimate:
    """One layout of the student's training on one kind of device."""

    layout: Layout
    memory: Footprint
    speed: Speed
    fits: bool | None
    """None where the device's memory is not known."""


@dataclass(frozen=True)
class Split:
    """Teacher and student side by side on one cluster, neither waiting for the other for long."""

    student: Estimate
    teacher_replicas: int
    devices_a_replica: int
    teacher_bytes: int
    """On each device of a replica."""
    teacher_tokens_per_s: float
    idle_devices: int
    label_bytes: int
    hours: float
    global_rows: int
    """In one optimizer step."""
    device_hours: float
    """Hours of the devices that are used; idle ones do not count."""
    cost: float | None
    """In the currency of the price; None without one."""

    @property
    def tokens_per_s(self) -> float:
        """Return the rate of the slower side, in tokens per second."""
        return min(self.student.speed.tokens_per_s, self.teacher_tokens_per_s)

    @property
    def used_devices(self) -> int:
        return self.student.layout.workers + self.teacher_replicas * self.devices_a_replica


def estimate(work: Workload, layout: Layout, cluster: Cluster, calibration: Calibration) -> Estimate:
    """The student's training alone; raises `SpecError` where the batch does not divide."""
    rows = work.rows(layout)
    if rows is None:
        raise SpecError(f"train.global_batch: {work.global_rows} rows do not divide among {layout.data} x micro-batches")
    memory = footprint(work.student, layout, rows, cluster.device.on_gpu)
    speed = training_speed(work.student, layout, rows, cluster, calibration)
    return Estimate(layout, memory, speed, fits(memory, cluster))


def fits(memory: Footprint, cluster: Cluster) -> bool | None:
    """Return whether a worker that needs `memory` fits on a device; None where the device's memory is not known."""
    return None if cluster.device.memory is None else memory.total <= ROOM * cluster.device.memory


def teacher_bytes(work: Workload, devices: int, on_gpu: bool) -> int:
    """Return the bytes on each of `devices` sharing one replica: weights, hidden states of two blocks, logits of one chunk."""
    model, size = work.teacher, 4 if work.teacher_precision == "fp32" else 2
    tokens = work.teacher_rows * work.seq_len
    widest = max(block.width + block.chosen * block.expert_width for block in model.blocks)
    passing = size * tokens * (4 * model.width + 3 * widest)
    logits = 12 * model.vocab * min(head_rows(model.vocab, on_gpu), tokens)
    process = GPU_PROCESS if on_gpu else CPU_PROCESS
    return size * model.total // devices + passing + logits + process


def devices_a_replica(work: Workload, cluster: Cluster) -> int:
    """Fewest devices, a power of two, that hold one teacher; raises `SpecError` if the cluster does not."""
    memory, devices = cluster.device.memory, 1
    if memory is None:
        return devices
    while teacher_bytes(work, devices, on_gpu=True) > ROOM * memory:
        devices *= 2
        if devices > cluster.devices:
            need = teacher_bytes(work, cluster.devices, on_gpu=True) / 1e9
            raise SpecError(f"cluster: {cluster} cannot hold the teacher, which needs {need:.0f} GB on each device")
    return devices


def balanced(
    work: Workload, layout: Layout, cluster: Cluster, calibration: Calibration, price_per_hour: float | None = None
) -> Split:
    """The most student workers, laid out like `layout`, that the teachers on the other devices keep busy.

    `layout.data` is what is searched for. Every token is labelled once, as a first epoch does. Where even the smallest
    student is faster than all teachers that have room, it will wait for them. Raises `SpecError` if there is no room for both.
    """
    return _best(lambda _: work, layout, cluster, calibration, price_per_hour)


def rebatched(
    work: Workload, layout: Layout, cluster: Cluster, calibration: Calibration, price_per_hour: float | None = None
) -> Split:
    """The split that is best if the global batch may grow to the next multiple of what its workers take at a time."""

    def grown(tried: Layout) -> Workload:
        micro_batches = tried.parts if tried.schedule == "dualpipev" else 1
        taken = tried.data * work.micro_rows * micro_batches
        return replace(work, global_rows=math.ceil(work.global_rows / taken) * taken)

    return _best(grown, layout, cluster, calibration, price_per_hour)


def _best(
    work_of: Callable[[Layout], Workload], layout: Layout, cluster: Cluster, calibration: Calibration, price: float | None
) -> Split:
    """Return the best split over all numbers of data-parallel workers, each doing the work that `work_of` gives it."""
    work = work_of(layout)
    replica = devices_a_replica(work, cluster)
    label_rate = teacher_speed(work.teacher, work.seq_len, replica, calibration)
    found: list[Split] = []
    for data in range(layout.expert, cluster.devices // layout.pipeline + 1, layout.expert):
        tried = replace(layout, data=data)
        replicas, work = (cluster.devices - tried.workers) // replica, work_of(tried)
        if replicas <= 0 or work.rows(tried) is None:
            continue
        student = estimate(work, tried, cluster, calibration)
        used = min(replicas, math.ceil(student.speed.tokens_per_s / label_rate))
        found.append(_split(work, student, used, replica, used * label_rate, cluster, price))
    if not found:
        raise SpecError(f"cluster: {cluster} has no room for a teacher on {replica} and a student on {layout.pipeline} devices")
    kept_busy = [split for split in found if split.teacher_tokens_per_s >= split.student.speed.tokens_per_s]
    return max(kept_busy or found, key=lambda split: split.tokens_per_s)


def _split(
    work: Workload, student: Estimate, replicas: int, replica: int, label_rate: float, cluster: Cluster, price: float | None
) -> Split:
    hours = work.tokens / min(label_rate, student.speed.tokens_per_s) / 3600
    used = student.layout.workers + replicas * replica
    return Split(
        student=student,
        teacher_replicas=replicas,
        devices_a_replica=replica,
        teacher_bytes=teacher_bytes(work, replica, cluster.device.on_gpu),
        teacher_tokens_per_s=label_rate,
        idle_devices=cluster.devices - used,
        label_bytes=int(work.tokens * work.label_bytes_per_token),
        hours=hours,
        global_rows=work.global_rows,
        device_hours=hours * used,
        cost=None if price is None else price * hours * used,
    )


def advice(work: Workload, layout: Layout, cluster: Cluster) -> list[str]:
    """Why `layout` does not fit and which strategies near to it do, one line each; empty if it fits or nobody knows."""
    memory = cluster.device.memory
    rows = work.rows(layout)
    if memory is None or rows is None:
        return []
    need = footprint(work.student, layout, rows, on_gpu=True)
    if fits(need, cluster):
        return []
    lines = [f"{layout} needs {_gb(need.total)} a worker; {ROOM:.0%} of {cluster.device.name}'s memory is {_gb(ROOM * memory)}"]
    found = [(other, footprint(work.student, other, rows, on_gpu=True)) for other in nearby(layout)]
    fitting = [f"{other}: {_gb(f.total)}{_on_host(f)}" for other, f in found if fits(f, cluster)]
    if fitting:
        return [*lines, *(f"fits: {line}" for line in fitting[:3])]
    least, f = min(found, key=lambda pair: pair[1].total)
    return [*lines, f"least of all: {least} with {_gb(f.total)}; take more workers, a smaller micro-batch or a larger device"]


def nearby(layout: Layout) -> Iterator[Layout]:
    """Strategies that need less memory than `layout`, on as many workers, the smallest change first."""
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    most = 1 if layout.pipeline > 1 else 3
    offloads: tuple[Literal["none", "cpu"], ...] = ("none",) if layout.pipeline > 1 or layout.expert > 1 else ("none", "cpu")
    for offload in offloads if layout.offload == "none" else ("cpu",):
        for checkpointing in (False, True) if not layout.checkpointing else (True,):
            for stage in stages[layout.zero_stage : most + 1]:
                other = replace(layout, zero_stage=stage, offload=offload, checkpointing=checkpointing)
                if other != layout and not (stage == 0 and offload == "cpu"):
                    yield other


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _on_host(f: Footprint) -> str:
    return f" and {_gb(f.host)} of the machine's memory" if f.host else ""
