"""A causal LM of which this process holds a share; the other parameters are on the meta device, where they take no memory.

Buffers are small and complete everywhere. Values are those of the whole model: read from a folder tensor by tensor, or drawn
from the seed in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.models.build import draw_model
from orchestrator.models.stored import stored_tensors

Share = Callable[[PreTrainedModel], set[str]]
"""Names of the parameters that this process holds, told from a model without any; a tied one goes by its first name."""


def drawn_share(config: PreTrainedConfig, seed: int, share: Share) -> PreTrainedModel:
    """The share of `draw_model(config, seed)`, bit for bit.

    What others hold is drawn as well, or the random numbers would not be the same, but all in the same scratch memory, as large
    as the largest parameter.
    """
    order: list[nn.Parameter] = []
    hull = _hull(config, order)
    held = share(hull)
    mine = {id(parameter) for name, parameter in hull.named_parameters() if name in held}
    coming = iter([id(parameter) in mine for parameter in order])
    scratch = torch.empty(max(parameter.numel() for parameter in order))

    def elsewhere(parameter: nn.Parameter) -> bool:
        return parameter.untyped_storage().data_ptr() == scratch.untyped_storage().data_ptr()

    def placed(parameter: nn.Parameter) -> nn.Parameter:
        if next(coming) or elsewhere(parameter):
            return parameter
        return nn.Parameter(scratch[: parameter.numel()].view_as(parameter), parameter.requires_grad)

    with _registered_as(placed):
        model = draw_model(config, seed)
    emptied: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and elsewhere(parameter):
                module._parameters[name] = emptied.setdefault(parameter, _on_meta(parameter))
    return model


def read_share(folder: Path, share: Share) -> PreTrainedModel:
    """The share of the causal LM in `folder`, in fp32.

    Its files must be `plainly_named`; raises `SpecError` if they lack a tensor.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model = _hull(config)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    wanted = share(model) | _stored_buffers(model)
    stored = stored_tensors(folder, model)
    for name in sorted(wanted & stored.keys()):
        put(model, name, stored[name].read().to(dtypes[name]))
        wanted.remove(name)
    if wanted:
        raise SpecError(f"{folder}: its weights are not those of its config.json: {min(wanted)} and {len(wanted) - 1} more")
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def plainly_named(folder: Path) -> bool:
    """Return whether the tensors in `folder` are exactly those of the model, one by one, with equal shapes and none left over.

    Most are. Where transformers splits or merges tensors as it loads them, they are readable to it alone.
    """
    try:
        model = _hull(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
        stored = stored_tensors(folder, model)
    except (ValueError, OSError, SafetensorError):
        return False
    kept = {*dict(model.named_parameters()), *_stored_buffers(model)}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name in kept}
    return all(tensor.as_it_is for tensor in stored.values()) and shapes == {n: tensor.shape for n, tensor in stored.items()}


def put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter or buffer `name` of `model`; it stays the same object if it is a `Parameter`."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._buffers:
        module._buffers[own] = value
    else:
        module._parameters[own] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)


def _stored_buffers(model: nn.Module) -> set[str]:
    return dict(model.named_buffers()).keys() & model.state_dict().keys()


def _hull(config: PreTrainedConfig, order: list[nn.Parameter] | None = None) -> PreTrainedModel:
    """The model of `config` in fp32 with all its buffers and no parameters; `order` gets these as they are registered."""

    def emptied(parameter: nn.Parameter) -> nn.Parameter:
        parameter = parameter if parameter.is_meta else _on_meta(parameter)
        if order is not None:
            order.append(parameter)
        return parameter

    with _registered_as(emptied):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


@contextmanager
def _registered_as(other: Callable[[nn.Parameter], nn.Parameter]) -> Generator[None]:
    """While it lasts, a module that is given a parameter gets `other` of it."""

    def hook(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:
        return other(parameter)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
