"""Training settings of a model: the batch algebra, the optimizer, the parallel strategy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestrator.spec.base import NO_RESULT, Spec


class Zero(Spec):
    """Data parallel with DeepSpeed ZeRO."""

    kind: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "cpu"] = "none"
    """cpu: the optimizer's states, and under stage 3 the weights, live in the machine's memory and not in the GPU's."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> Zero:
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("offload cpu needs stage 1 or more: at 0 every worker holds the whole state where it computes")
        return self


class Pipeline(Spec):
    """Blocks of the model spread over workers; groups of `stages` workers are data parallel to each other."""

    kind: Literal["pipeline"]
    stages: int = Field(default=2, ge=2)
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """dualpipev: each worker holds one stage on the way out and one on the way back (DeepSeek-AI's DualPipe, cut in half)."""
    stage: Literal[1] = 1
    """ZeRO stage among the data-parallel groups. Stages 2 and 3 cannot be combined with a pipeline, and at 0 DeepSpeed reports
    no gradient norm."""

    @property
    def parts(self) -> int:
        """Pieces that the model is cut into."""
        return self.stages * (2 if self.schedule == "dualpipev" else 1)


class Expert(Spec):
    """Data parallel, with the experts of every block spread over groups of `size` workers."""

    kind: Literal["expert"]
    size: int = Field(default=2, ge=2)
    stage: Literal[1, 2, 3] = 1
    """ZeRO stage; without ZeRO, DeepSpeed would clip by norms that each see one worker's experts only."""


Parallel = Annotated[Zero | Pipeline | Expert, Field(discriminator="kind")]


class Skip(Spec):
    """Go on without steps whose loss or gradient is not finite."""

    skip: int = Field(ge=1)
    """Steps that may be left out, at most, over the whole training."""


DEFAULT_STEPS = 100


def _steps_unless_epochs(given: dict[str, Any]) -> int | None:
    return DEFAULT_STEPS if given.get("epochs") is None else None


class Train(Spec):
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows, as in 0.5 or 3, in place of `steps`; the last step is a whole one."""
    steps: int | None = Field(default_factory=_steps_unless_epochs, ge=1, json_schema_extra={"default": DEFAULT_STEPS})
    """Optimizer steps; null where `epochs` say how many."""
    global_batch: int = Field(default=16, ge=1)
    """Rows in one optimizer step, over all workers."""
    micro_batch: Annotated[int, NO_RESULT] = Field(default=8, ge=1)
    """Rows in one forward pass of one worker. Nothing but rounding depends on it, and the load-balancing loss
    (`router_aux_weight`), which is taken over them."""
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """wsd: warm-up, then constant, then linear over the last fifth of the steps."""
    warmup_steps: int = Field(default=10, ge=0)
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """bf16 keeps fp32 master weights in the optimizer; fp8 is bf16 with the matrix products of inner blocks in fp8."""
    fp8_recipe: Literal["rowwise", "tensorwise", "blockwise"] = "rowwise"
    parallel: Parallel = Zero()
    activation_checkpointing: Annotated[bool, NO_RESULT] = False
    """Keep only what enters a block, and compute the rest again on the way back."""
    router_aux_weight: float = Field(default=0.001, ge=0)
    """Weight of the load-balancing loss of a mixture of experts."""
    router_bias_rate: float = Field(default=0.001, ge=0)
    """Step of the correction bias, for routers that have one (DeepSeek-V3): balance without a loss."""
    workers: Annotated[int, NO_RESULT] = Field(default=1, ge=1)
    cpus_per_worker: Annotated[float, NO_RESULT] = Field(default=1, gt=0)
    gpus_per_worker: Annotated[float, NO_RESULT] = Field(default=0, ge=0)
    checkpoint_every: Annotated[int, NO_RESULT] = Field(default=50, ge=1)
    """Steps between checkpoints. A killed run repeats at most these, and those made while the last one was being written."""
    keep: Literal["last", "best"] = "last"
    """Which weights training ends with; best: those of the evaluation (`evaluate.every`) with the least held-out cross
    entropy."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a better one; null: never. The learning rate is scheduled, and labels are
    made, for all steps nevertheless."""
    on_nonfinite: Annotated[Literal["stop"] | Skip, NO_RESULT] = "stop"
    """Handling of a step whose loss or gradient is not finite, as in `{skip: 3}`. Such a step changes neither weights nor
    optimizer; the report names its rows. stop: the run ends there, and can go on once this says skip."""
    max_restarts: Annotated[int, NO_RESULT] = Field(default=3, ge=0)
    """Restarts after the death of a worker, an accelerator fault or the loss of a node before the run stops (and can be
    resumed). Every new checkpoint renews them."""
    placement_timeout_s: Annotated[float, NO_RESULT] = Field(default=600, gt=0)
    """Seconds that the workers may wait for room on the cluster before the run gives up; in Ray Train's steps of a minute."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs:g} are both given; give one of them")
        if self.steps is None and self.epochs is None:
            raise ValueError("steps is null and epochs is not given; give one of them")
        return self

    @property
    def data_parallel(self) -> int:
        """Workers, or groups of them, that train on rows of their own."""
        return self.workers // (self.parallel.stages if isinstance(self.parallel, Pipeline) else 1)

    @model_validator(mode="after")
    def _workers_divide(self) -> Train:
        if isinstance(self.parallel, Pipeline) and self.workers % self.parallel.stages:
            raise ValueError(f"{self.workers} workers are no multiple of parallel.stages {self.parallel.stages}")
        if isinstance(self.parallel, Expert) and self.workers % self.parallel.size:
            raise ValueError(f"{self.workers} workers are no multiple of parallel.size {self.parallel.size}")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        ranks = self.data_parallel
        if self.global_batch % ranks:
            raise ValueError(f"global_batch {self.global_batch} does not divide among {ranks} workers")
        rows = self.global_batch // ranks
        if rows % min(self.micro_batch, rows):
            raise ValueError(f"{rows} rows per worker do not divide into micro_batch {self.micro_batch}")
        if isinstance(self.parallel, Pipeline) and self.parallel.schedule == "dualpipev":
            micro_batches = rows // min(self.micro_batch, rows)
            if micro_batches < self.parallel.parts:
                raise ValueError(
                    f"parallel.schedule dualpipev needs at least {self.parallel.parts} micro-batches a step, "
                    f"here {micro_batches}: a smaller micro_batch, a larger global_batch, or schedule 1f1b"
                )
        return self

    @model_validator(mode="after")
    def _supported(self) -> Train:
        if self.precision != "fp32" and self.parallel.stage == 0:
            raise ValueError(
                f"precision {self.precision} needs parallel.stage 1 or more: below it DeepSpeed has no exact master weights"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        return self
