"""The DeepSpeed configuration that a `train` section means."""

from __future__ import annotations

from typing import Any

from orchestrator.plan.batch import Batch
from orchestrator.spec.train import Expert, Train, Zero


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
                "fused": True,  # one pass over the weights in place of a dozen
            },
        },
        "zero_optimization": _zero(train),
        "steps_per_print": 10**9,
    }
    if isinstance(train.parallel, Zero) and train.parallel.offload == "cpu":
        config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own is compiled at first use
    if isinstance(train.parallel, Expert):
        # The pattern is that of a `Distiller`: AutoEP looks for a model type's own pattern in what it is given.
        experts = {"autoep_size": train.parallel.size, "moe_layer_pattern": r"model\.model\.layers\.\d+\.mlp"}
        config["expert_parallel"] = {"enabled": True, **experts}
    if train.precision != "fp32":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero(train: Train) -> dict[str, Any]:
    parallel = train.parallel
    zero: dict[str, Any] = {"stage": parallel.stage}
    if isinstance(parallel, Zero) and parallel.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if parallel.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return zero
