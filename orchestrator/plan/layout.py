"""Layout of a training over workers: the part of the model that each holds, and how long a pipeline idles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from orchestrator.plan.sizes import Block, Decoder
from orchestrator.spec.train import Expert, Pipeline, Train, Zero


@dataclass(frozen=True)
class Layout:
    """A strategy as the planner sees it; pipeline and experts may be combined, which the trainer does not do."""

    data: int = 1
    """Workers, or pipelines, that train on rows of their own."""
    pipeline: int = 1
    """Workers in one pipeline."""
    expert: int = 1
    """Data-parallel neighbours that share one set of experts; a divisor of `data`."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    offload: Literal["none", "cpu"] = "none"
    checkpointing: bool = False
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"

    @property
    def workers(self) -> int:
        return self.data * self.pipeline

    @property
    def parts(self) -> int:
        """Pieces that the model is cut into."""
        return self.pipeline * (2 if self.pipeline > 1 and self.schedule == "dualpipev" else 1)

    @property
    def element(self) -> int:
        """Bytes of a weight as the forward pass uses it; fp8 exists inside of matrix products only."""
        return 4 if self.precision == "fp32" else 2

    def __str__(self) -> str:
        zero = f"zero stage {self.zero_stage}"
        words = [f"pipeline {self.pipeline} {self.schedule}, {zero}" if self.pipeline > 1 else zero]
        words += [f"experts over {self.expert}"] if self.expert > 1 else []
        words += ["offload"] if self.offload == "cpu" else []
        words += ["activation checkpointing"] if self.checkpointing else []
        return " + ".join(words)


def layout_of(train: Train) -> Layout:
    """The layout that a `train` section asks for."""
    parallel = train.parallel
    return Layout(
        data=train.data_parallel,
        pipeline=parallel.stages if isinstance(parallel, Pipeline) else 1,
        expert=parallel.size if isinstance(parallel, Expert) else 1,
        zero_stage=parallel.stage,
        schedule=parallel.schedule if isinstance(parallel, Pipeline) else "1f1b",
        offload=parallel.offload if isinstance(parallel, Zero) else "none",
        checkpointing=train.activation_checkpointing,
        precision=train.precision,
    )


@dataclass(frozen=True)
class Share:
    """The part of a model that one worker holds, before ZeRO."""

    pieces: tuple[tuple[Block, ...], ...]
    """Blocks of its pieces of the model: one, or two under dualpipev."""
    embedding: int
    head: int
    """Parameters of the matrix that makes logits, tied or not; 0 on a worker that makes none."""
    shared: int
    """Parameters that all data-parallel workers hold alike."""
    experts: int
    """Parameters of the routed experts that are on this worker."""
    in_flight: float
    """Micro-batches whose activations are held at a time, of all pieces."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for piece in self.pieces for block in piece)

    @property
    def total(self) -> int:
        return self.shared + self.experts

    def partition(self, layout: Layout) -> int:
        """Parameters of this worker's ZeRO partition."""
        return self.shared // layout.data + self.experts // (layout.data // layout.expert)


def shares(model: Decoder, layout: Layout, micro_batches: int) -> list[Share]:
    """Return the share of the model that each worker of one pipeline holds; one share without a pipeline."""
    pieces, last = _cut(model, layout.parts), layout.parts - 1
    return [
        _share(
            model,
            layout,
            tuple(pieces[piece] for piece in held),
            first=0 in held,
            last=last in held,
            in_flight=_in_flight(layout, worker, micro_batches),
        )
        for worker, held in enumerate(_held(layout))
    ]


def bubble(layout: Layout, micro_batches: int) -> float:
    """Share of a step in which a worker of the pipeline waits, when the way back takes twice the way out.

    1F1B: (p-1)(F+B) beside m(F+B). DualPipeV, a piece being half as long: (p-1)(F+2B) - F beside 2m(F+B). DeepSeek-AI's own
    waits (p-1)(F&B + B - 3W) only, for it puts off the gradients of weights; DeepSpeed 0.19.8 makes them with the others
    (tests/bench/pipelines.py plays both schedules).
    """
    if layout.pipeline == 1:
        return 0.0
    one_way = layout.parts == layout.pipeline
    idle, busy = (layout.pipeline - 1, micro_batches) if one_way else (5 * layout.pipeline - 6, 6 * micro_batches)
    return idle / (busy + idle)


def _held(layout: Layout) -> list[tuple[int, ...]]:
    """Pieces of each worker of a pipeline."""
    if layout.parts == layout.pipeline:
        return [(worker,) for worker in range(layout.pipeline)]
    return [(worker, layout.parts - 1 - worker) for worker in range(layout.pipeline)]


def _cut(model: Decoder, parts: int) -> list[tuple[Block, ...]]:
    """Blocks of each part, as DeepSpeed cuts: blocks and the last norm count one each, the first parts are the longer ones."""
    least, longer = divmod(len(model.blocks) + 1, parts)
    starts = [part * least + min(part, longer) for part in range(parts + 1)]
    return [model.blocks[start:end] for start, end in pairwise(starts)]


def _in_flight(layout: Layout, worker: int, micro_batches: int) -> float:
    """1F1B: as many as there are workers from here to the end; DualPipeV: one more than pieces, of half a worker each."""
    if layout.parts == layout.pipeline:
        return min(micro_batches, layout.pipeline - worker)
    return min(micro_batches, (layout.parts + 1) / 2)


def _share(
    model: Decoder, layout: Layout, pieces: tuple[tuple[Block, ...], ...], first: bool, last: bool, in_flight: float
) -> Share:
    blocks = [block for piece in pieces for block in piece]
    embedding = model.embedding if first else 0
    if last and not first and not model.head:
        embedding = model.embedding  # a tied matrix lies on both ends
    shared = embedding + sum(block.shared for block in blocks) + (model.head + model.width if last else 0)
    experts = sum(block.experts * block.expert for block in blocks) // layout.expert
    return Share(pieces, embedding, model.vocab * model.width if last else 0, shared, experts, in_flight)
