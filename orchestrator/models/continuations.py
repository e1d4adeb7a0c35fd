"""The same prompts, continued by each model: what figures do not show of a model, its readers see at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 48
LONGEST_PROMPT = 128


def chosen_prompts(windows: torch.Tensor, kept: torch.Tensor) -> list[torch.Tensor]:
    """`PROMPTS` prompts out of `windows` [rows, seq + 1], evenly chosen.

    They follow from the windows alone, so that every model that is ever measured on these has the same. A prompt is cut at its
    beginning so that a model that reads no more than `seq` tokens has room for `NEW_TOKENS`, or for half of them all. `kept`
    [rows, seq] are the targets that are learnt from: what comes before them is a prompt.
    """
    count, seq = min(PROMPTS, len(windows)), kept.shape[1]
    rows = [i * len(windows) // count for i in range(count)]
    return [prompt_of(windows[row], kept[row])[-max(seq - NEW_TOKENS, seq // 2) :] for row in rows]


def prompt_of(ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the start of a continuation of the window `ids` [seq + 1]: its first prompt, or its first tokens if it has none.

    `kept` [seq] tells whether `ids[t + 1]` is learnt from; a prompt is a stretch that is not, before one that is.
    """
    starts = (kept[1:] & ~kept[:-1]).nonzero().flatten() + 1
    if len(starts) == 0:
        return ids[: min(PROMPT_TOKENS, len(kept) // 2)]
    end = int(starts[0])
    learnt = kept[:end].nonzero().flatten()
    begin = int(learnt[-1]) + 2 if len(learnt) else 0  # target t is the id t + 1
    return ids[max(begin, end + 1 - LONGEST_PROMPT) : end + 1]


def texts_of(prompts: Sequence[torch.Tensor], tokenizer_folder: Path) -> list[str]:
    """The text of each of `prompts`."""
    tokenizer = _tokenizer(tokenizer_folder)
    return [tokenizer.decode(prompt.tolist(), skip_special_tokens=True) for prompt in prompts]


def continuations(model: PreTrainedModel, prompts: Sequence[torch.Tensor], tokenizer_folder: Path) -> list[str]:
    """Return `model`'s continuation of each of `prompts`: up to `NEW_TOKENS` greedy tokens, fewer if it ends its text."""
    tokenizer = _tokenizer(tokenizer_folder)
    return [
        tokenizer.decode(_continue(model, prompt.to(model.device), tokenizer.eos_token_id), skip_special_tokens=True)
        for prompt in prompts
    ]


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _positions(model: PreTrainedModel) -> int:
    """Return the maximum number of tokens that `model` can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_PROMPT + NEW_TOKENS


@torch.inference_mode()
def _continue(model: PreTrainedModel, prompt: torch.Tensor, end: int | Sequence[int] | None) -> list[int]:
    """The ids that `model` says after `prompt` [n]."""
    # In place of what the folder says of sampling: all models are asked in the same way.
    model.generation_config = GenerationConfig(
        max_new_tokens=min(NEW_TOKENS, _positions(model) - len(prompt)),
        do_sample=False,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    generator: Any = model
    said = generator.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]))
    return said[0, len(prompt) :].tolist()
