"""A smaller model cut out of a larger one: Minitron's start of a student (arXiv 2407.14679 and 2408.11796).

Blocks, residual channels, FFN channels and key/value groups are kept by their importance and stay in their order. FFN
channels and groups are chosen in each block for itself, residual channels once for the whole model.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from orchestrator.errors import SpecError
from orchestrator.models.importance import WIDTH_NORMS, Importance, width_norms
from orchestrator.spec.model import PrunedStudent

Tensor = torch.Tensor

ROLES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("vocabulary", "width"),
    "lm_head": ("vocabulary", "width"),
    **dict.fromkeys(WIDTH_NORMS, ("width",)),
    "self_attn.q_proj": ("queries", "width"),
    "self_attn.k_proj": ("keys", "width"),
    "self_attn.v_proj": ("keys", "width"),
    "self_attn.o_proj": ("width", "queries"),
    "self_attn.q_norm": ("head",),
    "self_attn.k_norm": ("head",),
    "mlp.gate_proj": ("ffn", "width"),
    "mlp.up_proj": ("ffn", "width"),
    "mlp.down_proj": ("width", "ffn"),
}
"""By module of a decoder or of its blocks: what the dimensions of its weight run over. A bias runs over the first."""

PER_BLOCK = ("layer_types", "no_rope_layers")
"""Configuration values with an entry for every block."""


CONFIG_KEYS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "kv_heads": "num_key_value_heads",
}
"""By field of `PrunedStudent`: what transformers calls it."""


def check_prunable(model: PreTrainedModel, shape: PrunedStudent, section: str) -> None:
    """Raise `SpecError` naming `section` if `model` cannot be pruned at all, or not to `shape`. An `outline` will do."""
    refused = f"{section}: {type(model).__name__} cannot be pruned"
    places = {name: _place(model, name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    for name, (_, module) in places.items():
        if module not in ROLES:
            raise SpecError(f"{refused}: what {name} is made of is not known")
    if (None, "norm") not in places.values():
        raise SpecError(f"{refused}: its last norm has no weight")
    sizes = _sizes(model.config)
    for name, weight in model.named_parameters():
        axes = ROLES[places[name][1]]
        if any(sizes.get(axis, size) != size for axis, size in zip(axes, weight.shape, strict=False)):
            raise SpecError(f"{refused}: {name} has the shape {tuple(weight.shape)}, not {' x '.join(axes)}")
    for name, norm in width_norms(model).items():
        if _offset(norm) is None:
            raise SpecError(f"{refused}: {name} is no RMSNorm")
    pruned_config(model, shape, section)


@torch.no_grad()
def prune(model: PreTrainedModel, shape: PrunedStudent, importance: Importance, section: str) -> PreTrainedModel:
    """A new model of the class, dtype and device of `model`, made of the most important parts of its weights.

    Nothing is shared with `model`. The norms, and an embedding that scales what it puts out, are made to fit the new width.
    Raises `SpecError` as `check_prunable` does.
    """
    check_prunable(model, shape, section)
    config: Any = pruned_config(model, shape, section)
    kept = _Kept.of(importance, config)
    for key in PER_BLOCK:
        if values := getattr(model.config, key, None):
            setattr(config, key, [values[block] for block in kept.blocks])
    weights: dict[str, Tensor] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        block, module = _place(model, name.rpartition(".")[0])
        if block is None or block in kept.blocks:
            weights[kept.renamed(name, block)] = kept.cut(weight, ROLES[module], block or 0)
    with no_init_weights(), torch.device(model.device):  # every weight is set below
        made = type(model)._from_config(config, dtype=model.dtype)
    made.tie_weights()
    made.load_state_dict(weights)
    if config.hidden_size < model.config.hidden_size:
        _rescale(made, model, kept, importance.energy)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def pruned_config(model: PreTrainedModel, shape: PrunedStudent, section: str) -> PreTrainedConfig:
    """The configuration of `model` at `shape`, as if the first blocks were kept."""
    config: Any = copy.deepcopy(model.config)
    config.head_dim = _head_dim(config)
    queries_per_group = config.num_attention_heads // config.num_key_value_heads
    for key, name in CONFIG_KEYS.items():
        size, has = getattr(shape, key), getattr(config, name)
        if size is None:
            continue
        if not 0 < size <= has:
            raise SpecError(f"{section}.{key}: {size} asked for, but {type(model).__name__} has {has}")
        setattr(config, name, size)
    config.num_attention_heads = queries_per_group * config.num_key_value_heads
    for key in PER_BLOCK:
        if values := getattr(config, key, None):
            setattr(config, key, values[: config.num_hidden_layers])
    try:
        config.validate()
    except StrictDataclassError as error:
        raise SpecError(f"{section}: {error}") from error
    return config


@dataclass(frozen=True)
class _Kept:
    """Which parts stay, as ascending indices."""

    blocks: list[int]
    width: Tensor
    ffn: list[Tensor]
    """By block, of the model as it was."""
    groups: list[Tensor]
    config: Any
    """Configuration of the pruned model."""

    @classmethod
    def of(cls, scores: Importance, config: Any) -> _Kept:
        return cls(
            blocks=_best(scores.blocks, config.num_hidden_layers).tolist(),
            width=_best(scores.width, config.hidden_size),
            ffn=[_best(row, config.intermediate_size) for row in scores.ffn],
            groups=[_best(row, config.num_key_value_heads) for row in scores.heads],
            config=config,
        )

    def renamed(self, name: str, block: int | None) -> str:
        """Return the name that the weight or module `name`, which is in `block`, has in the pruned model."""
        return name if block is None else name.replace(f"layers.{block}.", f"layers.{self.blocks.index(block)}.")

    def cut(self, weight: Tensor, axes: tuple[str, ...], block: int) -> Tensor:
        """Return the part that is kept of a `weight` in `block` whose dimensions run over `axes`."""
        for dim in range(weight.dim()):
            index = self._along(axes[dim], block)
            weight = weight if index is None else weight.index_select(dim, index.to(weight.device))
        return weight

    def _along(self, axis: str, block: int) -> Tensor | None:
        """The indices that stay of `axis`; None for all."""
        config = self.config
        match axis:
            case "width":
                return self.width
            case "ffn":
                return self.ffn[block]
            case "keys":
                return _spread(self.groups[block], config.head_dim)
            case "queries":
                queries_per_group = config.num_attention_heads // config.num_key_value_heads
                return _spread(self.groups[block], queries_per_group * config.head_dim)
            case _:
                return None


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` highest of `scores` [n]; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _spread(groups: Tensor, size: int) -> Tensor:
    """The rows of `groups` in a weight where each has `size` of them."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _rescale(made: PreTrainedModel, model: PreTrainedModel, kept: _Kept, energy: dict[str, Tensor]) -> None:
    """Make up for the two things in which a width of h instead of H counts and that are no weights.

    An RMSNorm divides by the root of a mean over the channels. That mean is now H/h times the kept channels' share of the sum,
    and the norm's scale is multiplied by the root of this: where the lost channels were zero, nothing has changed. An embedding
    may multiply by a constant of the width, as Gemma's by its root: its weights take the ratio of the two constants, and the
    last norm the inverse where the head is tied to them.
    """
    embedding: Any = made.get_input_embeddings()
    head: Any = made.get_output_embeddings()
    ratio = _embedding_scale(model) / _embedding_scale(made)
    embedding.weight.mul_(ratio)
    for name in width_norms(model):
        block, _ = _place(model, name)
        if block is not None and block not in kept.blocks:
            continue
        norm: Any = made.get_submodule(kept.renamed(name, block))
        scale = math.sqrt(float(energy[name][kept.width].sum()) * len(energy[name]) / len(kept.width))
        if block is None and embedding.weight is head.weight:
            scale /= ratio
        offset = _offset(norm)
        norm.weight.copy_((norm.weight.float() + offset) * scale - offset)


def _embedding_scale(model: PreTrainedModel) -> float:
    """Return the factor by which the embedding of `model` multiplies its weights."""
    return getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)


@torch.no_grad()
def _offset(norm: nn.Module) -> int | None:
    """Return what an RMSNorm adds to its weight before multiplying by it: 1 in Gemma, else 0. None for another norm."""
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu")
    nn.init.ones_(probe.weight)
    scale = float(probe(torch.ones(1, len(probe.weight))).mean())
    return next((offset for offset in (0, 1) if math.isclose(scale, 1 + offset, rel_tol=1e-3)), None)


def _place(model: PreTrainedModel, name: str) -> tuple[int | None, str]:
    """(number of its block or None, its name in there) of the module `name` of `model`."""
    inner = name.removeprefix(f"{model.base_model_prefix}.")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", inner)
    return (None, inner) if found is None else (int(found[1]), found[2])


def _sizes(config: Any) -> dict[str, int]:
    """Length of each axis in `ROLES`; a vocabulary may be padded."""
    head = _head_dim(config)
    return {
        "width": config.hidden_size,
        "ffn": config.intermediate_size,
        "queries": config.num_attention_heads * head,
        "keys": config.num_key_value_heads * head,
        "head": head,
    }


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
