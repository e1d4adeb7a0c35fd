"""A decoder in pieces that can run on different processes: embedding, blocks one by one, final norm.

No modelling code is repeated: a block runs inside a copy of its own base model that holds nothing but this block, which
brings the position ids, the rotary embedding and the mask of its layer type with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.models.features import blocks
from orchestrator.models.head import TRIAL_IDS, last_hidden


class Embedding(nn.Module):
    """Token ids [rows, seq] to hidden states [rows, seq, width]."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


class Block(nn.Module):
    """One decoder block: hidden states [rows, seq, width] to the same."""

    def __init__(self, model: PreTrainedModel, number: int) -> None:
        super().__init__()
        self.base = with_layers(model.base_model, [blocks(model)[number]], layer_types(model, number), nn.Identity())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(inputs_embeds=hidden, use_cache=False).last_hidden_state


class Final(nn.Module):
    """The last norm; keeps an untied head beside it, which the loss applies."""

    def __init__(self, norm: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden)


@dataclass(frozen=True)
class Pieces:
    """One after another they do what `last_hidden` does."""

    embedding: Embedding
    blocks: list[Block]
    final: Final
    tied: bool
    """The head's weight is that of the embedding."""


def pieces(model: PreTrainedModel) -> Pieces:
    """`model` in pieces that share its parameters; raises `SpecError` for a model whose blocks cannot be told apart."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embed is not None and head is not None
    tied = head.weight is embed.weight
    cut = [Block(model, number) for number in range(len(blocks(model)))]
    return Pieces(Embedding(embed), cut, Final(last_norm(model), None if tied else head), tied)


@torch.no_grad()
def check_pieces(model: PreTrainedModel, section: str) -> None:
    """Raise `SpecError` naming `section` if the pieces of `model` make anything else than the whole does."""
    was_training = model.training
    model.eval()
    ids = torch.arange(TRIAL_IDS, device=model.device)[None] % model.config.get_text_config().vocab_size
    cut = pieces(model)
    hidden, whole = cut.embedding(ids), last_hidden(model, ids)
    for block in cut.blocks:
        hidden = block(hidden)
    same = torch.allclose(cut.final(hidden), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()), equal_nan=True)
    model.train(was_training)
    if not same:
        raise SpecError(f"{section}: {type(model).__name__} does more than to pass on hidden states from block to block")


def last_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last block of `model`; raises `SpecError` where there is none under that name."""
    norm: Any = getattr(model.base_model, "norm", None)
    if not isinstance(norm, nn.Module):
        raise SpecError(f"{type(model).__name__} is no decoder whose last norm can be told apart")
    return norm


def with_layers(base: Any, layers: list[nn.Module], layer_types: list[str] | None, norm: nn.Module) -> Any:
    """A copy of the base model `base` without embedding that holds only `layers`, of these `layer_types`, and `norm`."""
    alone = copy.copy(base)
    alone._modules = base._modules | {"layers": nn.ModuleList(layers), "embed_tokens": None, "norm": norm}
    alone.config = copy.deepcopy(base.config)
    alone.config.num_hidden_layers = len(layers)
    if layer_types is not None:
        alone.config.layer_types = layer_types
    return alone


def layer_types(model: PreTrainedModel, number: int) -> list[str] | None:
    """The kind of attention of block `number`, for a configuration that has that block only; None where all are alike."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    return None if types is None else [types[number]]
