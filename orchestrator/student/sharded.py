"""Start of a model on many ranks: no rank reads or draws more of it than a share of its own.

Then the parameters go round: one after another each is whole on all ranks, in the precision and on the device of training.
Where every rank trains a whole model, it stays; under ZeRO-3 DeepSpeed partitions it before the next one comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from orchestrator.models.build import DTYPES
from orchestrator.models.share import put
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.spec.train import Train
from orchestrator.student.distiller import Distiller


def even_share(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that this rank makes: about as many bytes as every other."""
    return {name for name, rank in _makers(model).items() if rank == dist.get_rank()}


def complete(model: PreTrainedModel, train: Train) -> None:
    """Make `model`, of which each rank has its `even_share`, whole on all of them; called on every rank."""
    for _ in _OneByOne(model, DTYPES[train.precision], _own_device()).parameters():
        pass


def partition(distiller: Distiller, train: Train) -> None:
    """Partition the model in `distiller`, of which each rank has its `even_share`, over all; called on every rank.

    What is beside the model is left to DeepSpeed, in the precision and on the device that it expects of a partitioned model.
    """
    import deepspeed

    dtype, device = DTYPES[train.precision], _own_device()
    deepspeed.zero.Init(module=_OneByOne(distiller.model, dtype, device), config_dict_or_path=deepspeed_config(train))
    for part in (distiller.inner, distiller.mtp):
        for parameter in part.parameters() if part is not None else ():
            parameter.data = parameter.data.to(device, dtype)
    for module in distiller.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def once(state: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The tensors in `state`, those that have several names under the first."""
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in state.items():
        first.setdefault(id(value), (name, value))
    return list(first.values())


def on_cpu(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of `value` on the CPU; of `dtype`, if it is a parameter."""
    return value.detach().to("cpu", dtype if isinstance(value, nn.Parameter) else value.dtype, copy=True)


def _own_device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    return torch.device(accelerator.current_device_name())


class _OneByOne(nn.Module):
    """Makes parameters whole as one goes through them.

    It is a module because `zero.Init` takes one, and partitions the parameters that it goes through.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that torch does not take it for a part of this module
        self._dtype, self._device = dtype, device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        (model,) = self._model
        aliases = _aliases(model)
        for name, maker in _makers(model).items():
            made = model.get_parameter(name)
            if made.is_meta:
                whole = torch.empty_like(made, dtype=self._dtype, device=self._device)
            else:
                whole = made.detach().to(self._device, self._dtype)
            del made
            dist.broadcast(whole.view(torch.uint8), src=maker)  # no backend has to know the type
            parameter = nn.Parameter(whole)
            del whole
            for alias in aliases[name]:
                put(model, alias, parameter)
            yield parameter


def _makers(model: nn.Module) -> dict[str, int]:
    """The rank that makes each parameter, by name and in order."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, before, makers = sum(sizes.values()), 0, dict[str, int]()
    for name, size in sizes.items():
        makers[name] = before * dist.get_world_size() // total
        before += size
    return makers


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first."""
    first: dict[nn.Parameter, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(parameter, name), []).append(name)
    return names
