"""How a model is trained: the batch algebra, the optimizer, the parallel strategy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.spec.base import Spec


class Zero(Spec):
    """Data parallel with DeepSpeed ZeRO."""

    kind: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 1


class Train(Spec):
    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    global_batch: int = Field(default=16, ge=1)
    """Rows in one optimizer step, over all workers."""
    micro_batch: int = Field(default=8, ge=1)
    """Rows in one forward pass of one worker."""
    learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights in the optimizer."""
    parallel: Zero = Zero()
    workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; what a killed run repeats at most."""
    max_restarts: int = Field(default=3, ge=0)
    """Worker deaths that are made good before the run stops (and can be resumed)."""

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        if self.global_batch % self.workers:
            raise ValueError(f"global_batch {self.global_batch} does not divide among {self.workers} workers")
        if (self.global_batch // self.workers) % min(self.micro_batch, self.global_batch // self.workers):
            raise ValueError(
                f"{self.global_batch // self.workers} rows per worker do not divide into micro_batch {self.micro_batch}"
            )
        if self.precision == "bf16" and self.parallel.stage == 0:
            raise ValueError("precision bf16 needs parallel.stage 1 or more: below it DeepSpeed has no exact master weights")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        return self
