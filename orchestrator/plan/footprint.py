"""Memory of one training worker, by what for. What DeepSpeed 0.19.8 allocates was measured (tests/bench/planner.py).

Activations follow Korthikanti et al. (2022), counted anew for gated feed-forward parts, grouped queries, latent attention and
routed experts, as transformers computes them with `sdpa` attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.plan.layout import Layout, Share, shares
from orchestrator.plan.memory import head_rows
from orchestrator.plan.sizes import Attention, Block, Decoder

REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way; on a GPU it is allocated whole."""
MAX_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most."""
CPU_PROCESS = 640 << 20
"""A worker without a model: torch, Ray, DeepSpeed and transformers, imported and used once. Measured."""
GPU_PROCESS = 1 << 30
"""CUDA context and communicators. Assumed."""
HEAP_HOLES = 1.4
"""On a CPU freed activations leave holes in glibc's heap that stay resident: measured 1.0 to 1.5."""
LABEL_BYTES = 64 * 12
"""Bytes of one position's labels as tensors: ids and probabilities."""
STEPS_HELD = 4
"""Steps whose labels a worker holds: one in use, one being read, two ahead."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device of the worker that needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    """Logits of one chunk with what the loss makes of them, and the fp32 gradient of the head's weight."""
    buffers: int
    """Bytes that communication and the optimizer's step need beyond the memory that activations leave free."""
    process: int
    host: int = 0
    """Bytes in the machine's memory instead: optimizer states and gradients that are offloaded."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.buffers + self.process


@dataclass(frozen=True)
class Rows:
    """The rows that one worker processes in one step."""

    micro_rows: int
    micro_batches: int
    seq_len: int

    @property
    def micro_tokens(self) -> int:
        return self.micro_rows * self.seq_len

    @property
    def tokens(self) -> int:
        return self.micro_tokens * self.micro_batches


def footprint(model: Decoder, layout: Layout, rows: Rows, on_gpu: bool) -> Footprint:
    """Return the footprint of the worker of a pipeline that needs most; without a pipeline, of any worker."""
    held = shares(model, layout, rows.micro_batches)
    return max((_worker(model, share, layout, rows, on_gpu) for share in held), key=lambda f: f.total)


def _worker(model: Decoder, share: Share, layout: Layout, rows: Rows, on_gpu: bool) -> Footprint:
    states = _states(share, layout)
    activations = _activations(model, share, layout, rows, on_gpu)
    logits = min(head_rows(model.vocab, on_gpu), rows.micro_tokens)
    head = 4 * (3 * logits * model.vocab + share.head) if share.head else 0
    labels = LABEL_BYTES * rows.tokens * STEPS_HELD if share.head else 0
    kept, reduction, update = _buffers(share, layout, on_gpu)
    offloaded = layout.offload == "cpu"
    phase = max(reduction, 0 if offloaded else update)
    if on_gpu:
        phase = max(0, phase - activations - head)
    else:
        activations = int(activations * HEAP_HOLES)
    return Footprint(
        weights=states.weights,
        gradients=0 if offloaded else states.gradients,
        optimizer=0 if offloaded else states.optimizer,
        activations=activations + (0 if on_gpu else labels),
        head=head,
        buffers=kept + phase,
        process=GPU_PROCESS if on_gpu else CPU_PROCESS,
        host=states.gradients + states.optimizer + update if offloaded else 0,
    )


@dataclass(frozen=True)
class States:
    weights: int
    gradients: int
    optimizer: int


def _states(share: Share, layout: Layout) -> States:
    """Model states by ZeRO stage (Rajbhandari et al. 2020). Gradients accumulate in fp32; from stage 1 on DeepSpeed keeps an
    fp32 copy of the weights beside AdamW's moments, also where the weights are fp32 themselves."""
    stage, whole, own = layout.zero_stage, share.total, share.partition(layout)
    return States(
        weights=layout.element * (own if stage == 3 else whole),
        gradients=4 * (own if stage >= 2 else whole),
        optimizer=12 * own if stage >= 1 else 8 * whole,
    )


def _buffers(share: Share, layout: Layout, on_gpu: bool) -> tuple[int, int, int]:
    """Bytes that stay, bytes while gradients are reduced, bytes while the optimizer steps; beyond the model states.

    torch's AdamW needs two temporaries of the size of what it updates on a CPU, one on a GPU. Gradients in the dtype of the
    weights live until they are reduced; under bf16 and stage 1 until the step has been made.
    """
    stage, whole, own, size = layout.zero_stage, share.total, share.partition(layout), layout.element
    bucket = REDUCE_BUCKET if on_gpu else min(REDUCE_BUCKET, whole)
    waiting = size * min(REDUCE_BUCKET, whole)
    adam = (4 if on_gpu else 8) * own
    if stage == 0:
        matrices = (max(b.feed_forward, 2 * b.experts * b.expert // layout.expert) // 3 for b in share.blocks)
        largest = max(share.embedding, share.head, *matrices)
        return 0, 4 * min(REDUCE_BUCKET, whole), 4 * whole if on_gpu else 8 * largest
    if stage == 3:
        gathered = size * min(MAX_LIVE, whole - own)
        return size * bucket + gathered, waiting, 4 * own + adam
    if size == 4:
        return 0, 4 * bucket + (waiting if stage == 2 else 0), 4 * own + adam
    if stage == 2:
        return 0, size * bucket + waiting, adam
    return 0, size * whole + 4 * min(REDUCE_BUCKET, whole), size * whole + adam


def _activations(model: Decoder, share: Share, layout: Layout, rows: Rows, on_gpu: bool) -> int:
    """Bytes of what the way back needs of the micro-batches in flight, of the blocks of `share`."""
    size = layout.element
    by_block = [block_bytes(model, block, size, rows.seq_len, on_gpu) for block in share.blocks]
    ends = (size * model.width if share.embedding else 0) + (norm_bytes(model.width, size) + size * model.width)
    scores = _scores_bytes(model.attention, rows.seq_len, on_gpu)
    if layout.checkpointing:
        once = max(by_block, default=0.0)
        return int(rows.micro_tokens * (share.in_flight * (size * model.width * len(by_block)) + once + scores + ends))
    return int(rows.micro_tokens * (share.in_flight * sum(by_block) + scores + ends))


def activation_bytes_per_token(model: Decoder, layout: Layout, seq_len: int, on_gpu: bool) -> float:
    """Return the bytes of all blocks and the passes over the logits, to which memory traffic is proportional."""
    blocks = sum(block_bytes(model, block, layout.element, seq_len, on_gpu) for block in model.blocks)
    return blocks + model.head_passes * model.vocab * (4 + layout.element)


def block_bytes(model: Decoder, block: Block, size: int, seq_len: int, on_gpu: bool) -> float:
    """Bytes per token that one block keeps for its way back, `size` bytes an element."""
    norms = block.norms // model.width * norm_bytes(model.width, size)
    ffn = 4 * size * block.width
    routed = block.chosen * size * (3 * model.width + 4 * block.expert_width)
    router = 4 * model.width + 8 * block.experts if block.experts else 0
    return norms + _attention_bytes(model, size, seq_len, on_gpu) + ffn + routed + router


def norm_bytes(width: int, size: int) -> int:
    """An RMS norm keeps its input in fp32, the normed value, and its output for what comes next."""
    return (4 + 2 * size) * width


def _attention_bytes(model: Decoder, size: int, seq_len: int, on_gpu: bool) -> float:
    a = model.attention
    latents = norm_bytes(a.q_rank, size) + norm_bytes(a.kv_rank, size)
    normed_heads = (a.heads + a.kv_heads) * a.qk_dim * (4 + size) if model.kind in ("qwen3", "qwen3_moe", "gemma3_text") else 0
    inputs = a.heads * (2 * a.qk_dim + a.v_dim)
    output = size * a.heads * a.v_dim
    if fused(a, on_gpu):
        return latents + normed_heads + size * inputs + output + 4 * a.heads
    return latents + normed_heads + 4 * inputs + output + 4 * a.heads * seq_len


def _scores_bytes(a: Attention, seq_len: int, on_gpu: bool) -> int:
    """Bytes per token of scores and mask of the block that is being computed, where attention is not fused."""
    return 0 if fused(a, on_gpu) else 6 * a.heads * seq_len


def fused(a: Attention, on_gpu: bool) -> bool:
    """Return whether `sdpa` has a kernel that never holds all scores: on a CPU only for keys and values of the same width."""
    return on_gpu or a.qk_dim == a.v_dim
