"""The same prompts, continued by each model: what figures do not show of a model, its readers see at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 48
LONGEST_PROMPT = 128


class Continuations(NamedTuple):
    """What models say after prompts, as far as they can."""

    texts: list[dict[str, str | None]]
    """By prompt: `prompt`, and a text by model, None from one that failed."""
    failures: dict[str, str]
    """By model, why it said nothing."""


def continued(
    models: Mapping[str, PreTrainedModel], windows: torch.Tensor, kept: torch.Tensor, tokenizer_folder: Path
) -> Continuations:
    """`PROMPTS` prompts out of `windows` [rows, seq + 1], evenly chosen, with what each of `models` says next.

    That is up to `NEW_TOKENS` greedily chosen tokens, fewer if the model ends its text. Prompts are cut at their beginning
    where they would leave a model no position to go on. `kept` [rows, seq] are the targets that are learnt from: what comes
    before them is a prompt. A model that fails is no reason to lose all that was measured, so this raises nothing for one.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    count = min(PROMPTS, len(windows))
    rows = [i * len(windows) // count for i in range(count)]
    room = min(_room(model) for model in models.values())
    prompts = [prompt_of(windows[row], kept[row])[-room:] for row in rows]
    texts: list[dict[str, str | None]] = [
        {"prompt": tokenizer.decode(prompt.tolist(), skip_special_tokens=True)} for prompt in prompts
    ]
    failures: dict[str, str] = {}
    for name, model in models.items():
        said: list[str | None] = [None] * count
        try:
            said = [
                tokenizer.decode(_continue(model, prompt, tokenizer.eos_token_id), skip_special_tokens=True)
                for prompt in prompts
            ]
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
        for entry, text in zip(texts, said, strict=True):
            entry[name] = text
    return Continuations(texts, failures)


def prompt_of(ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Where a continuation of the window `ids` [seq + 1] starts from: its first prompt, or its first tokens if it has none.

    `kept` [seq] tells whether `ids[t + 1]` is learnt from; a prompt is a stretch that is not, before one that is.
    """
    starts = (kept[1:] & ~kept[:-1]).nonzero().flatten() + 1
    if len(starts) == 0:
        return ids[: min(PROMPT_TOKENS, len(kept) // 2)]
    end = int(starts[0])
    learnt = kept[:end].nonzero().flatten()
    begin = int(learnt[-1]) + 2 if len(learnt) else 0  # target t is the id t + 1
    return ids[max(begin, end + 1 - LONGEST_PROMPT) : end + 1]


def _positions(model: PreTrainedModel) -> int:
    """How many tokens `model` can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_PROMPT + NEW_TOKENS


def _room(model: PreTrainedModel) -> int:
    """The longest prompt that leaves `model` positions for `NEW_TOKENS`, or half of those it has."""
    return max(_positions(model) - NEW_TOKENS, _positions(model) // 2)


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
