"""Multi-token prediction: modules beside a causal LM that predict tokens further ahead, one after another.

DeepSeek-V3 (arXiv 2412.19437), section 2.2. Module k, from 1, makes of what is known at position i and of the next k tokens

    h^k_i = norm_k(Block_k(M_k [norm(h^(k-1)_i) ; norm(Emb(t_(i+k)))]))

from which the model's own output head predicts t_(i+k+1). Embedding and head are those of the model.

h^0 is what the model's head is applied to, after the final norm, and so is every h^k. The paper leaves it open ("the
representation given by the main model"); this is what DeepSeek's weights were trained on and what transformers' `MtpModel`
and vLLM give them, and the last hidden state that the loss has anyway. All norms are of the class of the model's final one.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from orchestrator.models.features import blocks
from orchestrator.models.stages import last_norm, layer_types, with_layers

Tensor = torch.Tensor

FOLDER = "mtp"
"""Beside the model's own files; engines take every .safetensors next to them for the model's."""
WEIGHTS, FACTS = f"{FOLDER}/weights.safetensors", f"{FOLDER}/mtp.json"


def shifted(depth: int, seq: int) -> slice:
    """Positions i + depth, for i from 0, in `seq` positions: what the first seq - depth positions of module `depth` belong to.

    The token at i + depth is the last that h^depth_i has seen; the label at position i + depth, which is about the token
    after it, is what it learns: `labels[:, shifted(depth, seq)]`, or `ids[:, 1:][:, shifted(depth, seq)]` if tokens are labels.
    """
    return slice(depth, seq)


class MultiTokenPrediction(nn.Module):
    """`depth` modules for `model`, in its dtype and on its device; the same `seed` gives the same weights on every machine.

    A block is of the class and kind (attention, experts) of the model's last one. The model is used, not owned: its
    parameters are not among those of this module. Raises `SpecError` for a model whose blocks are not found.
    """

    def __init__(self, model: PreTrainedModel, depth: int, seed: int) -> None:
        super().__init__()
        decoder: Any = model.base_model
        last = len(blocks(model)) - 1
        last_norm(model)
        self.depth = depth
        self._model = (model,)  # in a tuple, so that torch does not take it for a part of this module
        self._types = layer_types(model, last)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.steps = nn.ModuleList(_Step(decoder) for _ in range(depth))
        self.to(next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu")), model.dtype)

    def forward(self, hidden: Tensor, ids: Tensor) -> list[Tensor]:
        """For each depth k from 1, [rows, seq - k, width]: the states from which the head predicts ids[:, k + 1 :].

        Takes the model's last `hidden` state [rows, seq, width] of ids[:, :-1], and `ids` [rows, seq + 1].
        """
        seq = hidden.shape[1]
        states: list[Tensor] = []
        for depth in range(1, self.depth + 1):
            hidden = self.step(depth, hidden[:, :-1], ids[:, shifted(depth, seq)])
            states.append(hidden)
        return states

    def step(self, depth: int, hidden: Tensor, ahead: Tensor) -> Tensor:
        """h^depth, from h^(depth - 1) `hidden` and the tokens `ahead` [rows, n], t_(i + depth) at i; both [rows, n, width]."""
        (model,) = self._model
        step: Any = self.steps[depth - 1]
        embedded = model.get_input_embeddings()(ahead)
        joined = step.projection(torch.cat([step.hidden_norm(hidden), step.embedding_norm(embedded)], -1))
        # Not called as a module: hooks on the decoder are about the decoder.
        shell = with_layers(model.base_model, [step.block], self._types, step.norm)
        return shell.forward(inputs_embeds=joined, use_cache=False).last_hidden_state


class _Step(nn.Module):
    """The parameters of one depth, freshly drawn the way `decoder` draws its own."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        width = decoder.config.hidden_size
        self.hidden_norm, self.embedding_norm, self.norm = (_like(decoder.norm) for _ in range(3))
        self.projection = nn.Linear(2 * width, width, bias=False)
        # With the index of the last block, for the configuration may give each its own kind.
        self.block = type(decoder.layers[-1])(decoder.config, len(decoder.layers) - 1)
        self.apply(decoder._init_weights)
        self.requires_grad_(True)  # the norm of a frozen model is copied frozen


def _like(norm: nn.Module) -> nn.Module:
    """A copy, without values where another process holds those of `norm`."""
    copied = copy.deepcopy(norm)
    return copied.to_empty(device="cpu") if any(p.is_meta for p in copied.parameters()) else copied


def save_mtp(state: dict[str, Tensor], depth: int, folder: Path) -> None:
    """Write the `state` of `depth` modules beside the model in `folder`; nothing in it is the model's."""
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file(state, folder / WEIGHTS)
    (folder / FACTS).write_text(json.dumps({"depth": depth}), encoding="utf-8")


def load_mtp(model: PreTrainedModel, folder: Path) -> MultiTokenPrediction | None:
    """The modules that `save_mtp` wrote to `folder`, for the `model` of that folder; None if there are none."""
    if not (folder / FACTS).exists():
        return None
    depth = json.loads((folder / FACTS).read_text(encoding="utf-8"))["depth"]
    module = MultiTokenPrediction(model, depth, seed=0)
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module.train(model.training)
