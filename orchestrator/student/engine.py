"""The one place that calls `deepspeed.initialize`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.spec.train import Train


def join_group() -> None:
    """Make DeepSpeed part of this process's group; before anything else of it is used."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would compile its shared-memory collectives at start, for minutes; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def start_engine(module: nn.Module, train: Train) -> Any:
    """A DeepSpeed engine around `module`, on this process's rank; the group has been joined."""
    import deepspeed

    initialize: Any = deepspeed.initialize
    engine, *_ = initialize(
        model=module, model_parameters=parameter_groups(module, train.weight_decay), config=deepspeed_config(train)
    )
    return engine


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; norms and biases go without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"name": "matrices", "params": [p for p in trained if _dimensions(p) >= 2], "weight_decay": weight_decay},
        {"name": "vectors", "params": [p for p in trained if _dimensions(p) < 2], "weight_decay": 0.0},
    ]


def _dimensions(parameter: nn.Parameter) -> int:
    """Return the number of dimensions of the whole parameter; a partitioned one is flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
