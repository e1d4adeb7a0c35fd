"""Value of multi-token prediction as a draft model: acceptance on given text, and greedy self-speculative decoding.

Module k drafts the token k + 1 ahead; the model itself says one token for certain and checks the drafts in its next forward
(Leviathan et al. 2023 with greedy choices: a draft is accepted if it is what the model would have said).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from orchestrator.losses.head import Buffers, Head
from orchestrator.models.head import last_hidden, output_head
from orchestrator.models.mtp import MultiTokenPrediction, load_mtp, shifted
from orchestrator.plan.memory import head_rows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of drafts, over all positions at which the deepest module has a token to be checked."""

    positions: int
    rates: tuple[float, ...]
    """By depth k from 1: share of positions whose drafts 1 to k are all accepted."""

    @property
    def tokens_per_forward(self) -> float:
        """Expected tokens by forward of the model, if decoding stops at all positions equally often."""
        return 1 + sum(self.rates)


def measured_drafts(model: PreTrainedModel, folder: Path, windows: Tensor, micro_batch: int) -> dict[str, float]:
    """Figures of the multi-token-prediction modules beside the weights of `model` in `folder`, as its own draft model.

    They are measured on `windows` [rows, seq + 1], `micro_batch` rows at a time; none where `folder` has no such modules.
    """
    mtp = load_mtp(model, folder)
    if mtp is None:
        return {}
    measured = [acceptance(model, mtp, part.to(model.device)) for part in windows.split(micro_batch)]
    positions = sum(m.positions for m in measured)
    rates = [sum(m.positions * m.rates[k] for m in measured) / positions for k in range(mtp.depth)]
    named = {f"mtp_acceptance_{k}": rate for k, rate in enumerate(rates, 1)}
    return named | {"mtp_tokens_per_forward": Acceptance(positions, tuple(rates)).tokens_per_forward}


@torch.inference_mode()
def acceptance(model: PreTrainedModel, mtp: MultiTokenPrediction, ids: Tensor) -> Acceptance:
    """Acceptance on text, `ids` [rows, seq + 1] with seq > depth: an estimate that takes one forward.

    At position i, draft k is the choice of module k given ids[: i + k + 1], and it is accepted if all before it are and the
    model, given the same tokens, chooses the same. Decoding differs in that its tokens are the model's choices, not the text.
    """
    head = output_head(model)
    hidden = last_hidden(model, ids[:, :-1])
    seq = hidden.shape[1]
    own = _choices(head, hidden)
    everywhere = seq - mtp.depth
    holds = torch.ones_like(own[:, :everywhere], dtype=torch.bool)
    rates: list[float] = []
    for depth, states in enumerate(mtp(hidden, ids), start=1):
        drafts = _choices(head, states)
        holds &= (drafts == own[:, shifted(depth, seq)])[:, :everywhere]
        rates.append(float(holds.double().mean()))
    return Acceptance(holds.numel(), tuple(rates))


@torch.inference_mode()
def generate(model: PreTrainedModel, mtp: MultiTokenPrediction, prompt: Tensor, new_tokens: int) -> tuple[Tensor, int]:
    """`prompt` [n] followed by `new_tokens` that `model` chooses greedily, [n + new_tokens], and the forwards of it that took.

    The tokens are those of plain greedy decoding (which takes a forward each), up to ties that rounding decides. Without a
    key-value cache, so this counts forwards and is not fast.
    """
    head = output_head(model)
    text, drafts, forwards = prompt, prompt[:0], 0
    while len(text) < len(prompt) + new_tokens:
        hidden = last_hidden(model, torch.cat([text, drafts])[None])
        forwards += 1
        own = head(hidden[0, len(text) - 1 :]).argmax(-1)
        accepted = int((own[:-1] == drafts).long().cumprod(0).sum())
        text = torch.cat([text, own[: accepted + 1]])
        drafts = _drafts(head, mtp, hidden[:, : len(text) - 1], text)
    return text[: len(prompt) + new_tokens], forwards


def _drafts(head: Head, mtp: MultiTokenPrediction, hidden: Tensor, text: Tensor) -> Tensor:
    """[depth]: the tokens that follow `text` [n], from the last `hidden` state [1, n - 1, width] of all but its last token."""
    ids = text
    for depth in range(1, mtp.depth + 1):
        hidden = mtp.step(depth, hidden, ids[None, depth:])
        ids = torch.cat([ids, head(hidden[0, -1:]).argmax(-1)])
    return ids[len(text) :]


def _choices(head: Head, hidden: Tensor) -> Tensor:
    """[rows, seq]: the most likely id by position of `hidden` [rows, seq, width], a chunk of positions at a time."""
    states = hidden.flatten(0, 1)
    rows = min(head_rows(len(head.weight), states.is_cuda), len(states))
    buffers = Buffers(head.weight, rows)
    return torch.cat([head(part, buffers).argmax(-1) for part in states.split(rows)]).view(hidden.shape[:2])
