"""Training speed of a layout: FLOPs, traffic between workers, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.plan.cluster import Calibration, Cluster
from orchestrator.plan.footprint import Rows, activation_bytes_per_token
from orchestrator.plan.layout import Layout, bubble, shares
from orchestrator.plan.sizes import Decoder


@dataclass(frozen=True)
class Traffic:
    """Bytes that one worker sends in a step, by what for."""

    zero: float
    """Gradients to be summed and weights to be gathered among the data-parallel workers."""
    pipeline: float
    experts: float

    @property
    def total(self) -> float:
        return self.zero + self.pipeline + self.experts


@dataclass(frozen=True)
class Speed:
    """Expected times of one optimizer step."""

    compute_s: float
    """Forward and backward passes of one worker, without waiting."""
    bubble: float
    """Share of the passes' time that the pipeline idles."""
    traffic: Traffic
    communication_s: float
    """Seconds of communication that are not hidden behind the passes."""
    update_s: float
    step_s: float
    tokens_per_s: float
    """Tokens per second of all workers together."""


def forward_flops(model: Decoder, seq_len: int) -> float:
    """Per token: 2 for each parameter it is multiplied with (the head included), and causal attention's two products."""
    return 2.0 * model.multiplied + _attention_flops(model, seq_len)


def training_flops(model: Decoder, seq_len: int, checkpointing: bool = False) -> float:
    """Per token: the way back takes twice the way out; checkpointing passes the blocks once more."""
    head = 2.0 * model.head_passes * model.vocab * model.width
    again = forward_flops(model, seq_len) - head if checkpointing else 0.0
    return 3 * forward_flops(model, seq_len) + again


def _attention_flops(model: Decoder, seq_len: int) -> float:
    """Scores and their product with the values; a position sees half of the sequence on average."""
    a = model.attention
    return len(model.blocks) * a.heads * (a.qk_dim + a.v_dim) * seq_len


def traffic(model: Decoder, layout: Layout, rows: Rows) -> Traffic:
    """Bytes one worker sends in a step.

    ZeRO: 2, 2, 2 and 3 times the parameters (Rajbhandari et al. 2020) where a step is one micro-batch. Stages 2 and 3 reduce
    gradients, and stage 3 gathers weights twice, in every micro-batch.
    """
    share = max(shares(model, layout, rows.micro_batches), key=lambda s: s.total)
    size, passes = layout.element, rows.micro_batches
    others = _others(layout.data)
    expert_copies = _others(layout.data // layout.expert)
    moved = share.shared * others + share.experts * expert_copies
    if layout.zero_stage == 3:
        zero = moved * size * 3 * passes
    elif layout.zero_stage == 2:
        zero = moved * size * (passes + 1)
    else:
        zero = moved * (4 + size)  # gradients are summed in fp32
    states = size * model.width * rows.tokens
    between = 2 * states * (layout.parts // layout.pipeline) if layout.pipeline > 1 else 0
    routed = sum(block.chosen for block in share.blocks)
    return Traffic(zero, between, 4 * states * routed * _others(layout.expert))


def _others(group: int) -> float:
    """Share of a ring's data that a member sends on."""
    return (group - 1) / group


def training_speed(model: Decoder, layout: Layout, rows: Rows, cluster: Cluster, calibration: Calibration) -> Speed:
    """Return the speed of a training step in which each of `layout.data` replicas processes `rows`.

    DualPipeV hides what pipeline and experts send behind the passes; nothing else is taken to overlap.
    """
    tokens, workers = rows.tokens, layout.pipeline
    flops = training_flops(model, rows.seq_len, layout.checkpointing)
    touched = activation_bytes_per_token(model, layout, rows.seq_len, cluster.device.on_gpu)
    per_token = flops / calibration.student_flops_per_s + touched / calibration.activation_bytes_per_s
    compute = tokens * per_token / workers
    idle = bubble(layout, rows.micro_batches)
    sent = traffic(model, layout, rows)
    share = max(shares(model, layout, rows.micro_batches), key=lambda s: s.total)
    own = share.partition(layout) if layout.zero_stage else share.total
    update = 12 * own / calibration.update_bytes_per_s
    waits = sent.zero / cluster.link(layout.workers)
    if layout.parts == layout.pipeline:
        waits += sent.experts / cluster.link(layout.expert) + sent.pipeline / cluster.link(layout.workers)
    step = compute / (1 - idle) + waits + update
    return Speed(compute, idle, sent, waits, update, step, layout.data * tokens / step)


def teacher_speed(model: Decoder, seq_len: int, devices: int, calibration: Calibration) -> float:
    """Tokens per second that a teacher on `devices` labels."""
    return devices * calibration.teacher_flops_per_s / forward_flops(model, seq_len)
