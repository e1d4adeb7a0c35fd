"""Continuations: the prompts are what a mask says they are, and the texts those of plain greedy decoding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from orchestrator.models.continuations import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    _continue,
    chosen_prompts,
    continuations,
    prompt_of,
    texts_of,
)
from tests.conftest import TokenizedCorpus
from tests.unit.test_tokens import tiny


def greedy(model: PreTrainedModel, prompt: list[int], end: int) -> list[int]:
    """Without a cache, token by token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS and end not in ids[len(prompt) :]:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_texts_are_those_of_greedy_decoding(seed: int, tokenized: TokenizedCorpus) -> None:
    folder = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), tiny(seed, 32)
    # A folder's own settings, such as a wrong end, must not matter.
    model.generation_config.eos_token_id, model.generation_config.do_sample = 7, True
    model.config.use_cache = False
    windows = torch.randint(1, 400, (10, 129), generator=torch.Generator().manual_seed(seed))
    prompts = chosen_prompts(windows, torch.ones(10, 128, dtype=torch.bool))
    assert [p.tolist() for p in prompts] == [windows[i * 10 // PROMPTS, :PROMPT_TOKENS].tolist() for i in range(PROMPTS)]
    assert texts_of(prompts, folder) == [tokenizer.decode(p.tolist(), skip_special_tokens=True) for p in prompts]
    found = continuations(model, prompts, folder)
    assert found == continuations(model, prompts, folder)
    due = [greedy(model, prompt.tolist(), tokenizer.eos_token_id) for prompt in prompts]
    assert found == [tokenizer.decode(said, skip_special_tokens=True) for said in due]


def test_a_text_ends_with_the_end_token_and_within_the_models_context(seed: int) -> None:
    model, prompt = tiny(seed, 32), torch.arange(1, 9)
    whole = greedy(model, prompt.tolist(), end=-1)
    end = whole[5]
    said = _continue(model, prompt, end)
    assert said == greedy(model, prompt.tolist(), end) and len(said) <= 6 and said[-1] == end
    model.config.max_position_embeddings = 20
    assert _continue(model, prompt, -1) == whole[:12]


def test_a_prompt_leaves_any_model_room_to_go_on(seed: int, tokenized: TokenizedCorpus) -> None:
    """Fault of kind: a prompt as long as the position limit left no new token, and generation refused to begin."""
    folder = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), tiny(seed + 1, 16)
    model.config.max_position_embeddings = 64
    windows = torch.randint(1, 400, (1, 65), generator=torch.Generator().manual_seed(seed))
    kept = torch.arange(64)[None] >= 63  # a prompt of 64 ids, then one that is learnt
    (prompt,) = chosen_prompts(windows, kept)
    assert prompt.tolist() == windows[0, 32:64].tolist(), "whatever the model, so that another one gets the same"
    said = greedy(model, prompt.tolist(), tokenizer.eos_token_id)[:32]
    assert continuations(model, [prompt], folder) == [tokenizer.decode(said, skip_special_tokens=True)] != [""]
    with pytest.raises(ValueError, match="max_new_tokens"):
        _continue(model, windows[0, :64], tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("kept", "prompt"),
    [
        ("1111111111", [0, 1, 2, 3, 4]),  # plain text: its first half at most
        ("0001111111", [0, 1, 2, 3]),  # a prompt of four ids, then the answer
        ("1100011100", [3, 4, 5]),  # the end of an answer (ids 1, 2), a prompt (3 to 5), its answer (6 to 8)
        ("1111100000", [0, 1, 2, 3, 4]),  # a prompt whose answer is in another window
    ],
)
def test_prompt_is_what_comes_before_the_learnt_targets(kept: str, prompt: list[int]) -> None:
    mask = torch.tensor([mark == "1" for mark in kept])
    assert prompt_of(torch.arange(11), mask).tolist() == prompt
