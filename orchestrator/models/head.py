"""The output head of a causal LM, taken out of it so that a loss can apply it chunk by chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.losses.head import Head
from orchestrator.models.build import draw_model, outline
from orchestrator.models.stored import Stored, stored_tensors

TRIAL_IDS, TRIAL_WIDTH = 8, 16


def output_head(model: PreTrainedModel) -> Head:
    """The head of `model`; shares its weights."""
    layer: Any = model.get_output_embeddings()
    config: Any = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def last_hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[rows, seq, width]: what the head of `model` is applied to, for `ids` [rows, seq]."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: PreTrainedModel, section: str, head: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
    """Raise `SpecError` if `head`, or what `output_head` takes, makes other logits of hidden states than `model` itself."""
    was_training = model.training
    model.eval()  # dropout would make two calls differ
    ids = torch.arange(TRIAL_IDS, device=model.device)[None] % model.config.get_text_config().vocab_size
    own = model(input_ids=ids, use_cache=False).logits.float()[0]
    taken = (head or output_head(model))(last_hidden(model, ids)[0])
    model.train(was_training)
    rtol = 1e-4 if model.dtype == torch.float32 else 5e-2
    atol = rtol * float(own.nan_to_num().abs().max())
    # Weights that are no numbers are another complaint, made where it is known what came of them.
    if own.shape != taken.shape or not torch.allclose(own, taken, rtol, atol, equal_nan=True):
        raise SpecError(f"{section}: {type(model).__name__} makes its logits in a way that the chunked head does not know")


def trial_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the architecture of `config`, for checks of what it does: two blocks of full width, but little else.

    It knows `TRIAL_IDS` ids. What a block multiplies in between is narrow: no other part has to fit that.
    """
    config = copy.deepcopy(config)
    inner: Any = config.get_text_config()
    inner.num_hidden_layers = min(2, inner.num_hidden_layers)
    inner.vocab_size, inner.pad_token_id = TRIAL_IDS, None
    for name in ("intermediate_size", "moe_intermediate_size"):
        if isinstance(getattr(inner, name, None), int):
            setattr(inner, name, TRIAL_WIDTH)
    return draw_model(config, seed=0)


def load_head(folder: Path, dtype: torch.dtype, on: torch.device) -> Head:
    """The head of the causal LM in `folder` alone; nothing else of the model is loaded."""
    head, weight, bias = head_tensors(folder, "teacher")
    read = None if bias is None else bias.read().to(on, dtype)
    return Head(weight.read().to(on, dtype), read, head.scale, head.softcap)


def head_tensors(folder: Path, key: str) -> tuple[Head, Stored, Stored | None]:
    """The head of the causal LM in `folder` without values, and where its weight and its bias are stored.

    Raises `SpecError` naming `key` if the weights lack one of them.
    """
    model = outline(folder)
    head, stored = output_head(model), stored_tensors(folder, model)

    def found(parameter: torch.Tensor) -> Stored:
        names = [name for name, own in model.named_parameters(remove_duplicate=False) if own is parameter]
        for name in names:
            if name in stored:
                return stored[name]
        raise SpecError(f"{key}: {folder} holds no tensor {names[0]}")

    return head, found(head.weight), None if head.bias is None else found(head.bias)
