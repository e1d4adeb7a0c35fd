"""The DeepSpeed configuration that a `train` section means."""

from __future__ import annotations

from typing import Any

from orchestrator.plan.batch import Batch
from orchestrator.spec.train import Train


def deepspeed_config(train: Train) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`.

    The optimizer is torch's AdamW: DeepSpeed's own CPU and fused ones are built from source at first use.
    """
    batch = Batch.of(train)
    config: dict[str, Any] = {
        "train_batch_size": batch.global_rows,
        "train_micro_batch_size_per_gpu": batch.micro_rows,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "weight_decay": train.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": train.parallel.stage},
        "steps_per_print": 10**9,
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
