"""Continuations: the prompts are what a mask says they are, and the texts those of plain greedy decoding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from orchestrator.evaluate.generate import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, _continue, continued, prompt_of
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
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {"teacher": tiny(seed, 32), "student": tiny(seed + 1, 16)}
    for model in models.values():  # a folder's own settings, such as a wrong end, must not matter
        model.generation_config.eos_token_id, model.generation_config.do_sample = 7, True
        model.config.use_cache = False
    windows = torch.randint(1, 400, (10, 129), generator=torch.Generator().manual_seed(seed))
    kept = torch.ones(10, 128, dtype=torch.bool)
    found, failures = continued(models, windows, kept, folder)
    assert not failures
    assert len(found) == PROMPTS and set(found[0]) == {"prompt", "teacher", "student"}
    assert found == continued(models, windows, kept, folder).texts
    for i, entry in enumerate(found):
        prompt = windows[i * 10 // PROMPTS, :PROMPT_TOKENS].tolist()
        assert entry["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)
        for name, model in models.items():
            assert entry[name] == tokenizer.decode(greedy(model, prompt, tokenizer.eos_token_id), skip_special_tokens=True)


def test_a_text_ends_with_the_end_token_and_within_the_models_context(seed: int) -> None:
    model, prompt = tiny(seed, 32), torch.arange(1, 9)
    whole = greedy(model, prompt.tolist(), end=-1)
    end = whole[5]
    said = _continue(model, prompt, end)
    assert said == greedy(model, prompt.tolist(), end) and len(said) <= 6 and said[-1] == end
    model.config.max_position_embeddings = 20
    assert _continue(model, prompt, -1) == whole[:12]


def test_a_prompt_leaves_every_model_room_to_go_on(seed: int, tokenized: TokenizedCorpus) -> None:
    """Fault of kind: a prompt as long as the position limit left no new token, and generation refused to begin."""
    folder = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {"teacher": tiny(seed, 32), "student": tiny(seed + 1, 16)}
    models["student"].config.max_position_embeddings = 64
    windows = torch.randint(1, 400, (1, 65), generator=torch.Generator().manual_seed(seed))
    kept = torch.arange(64)[None] >= 63  # a prompt of 64 ids, then one that is learnt
    (entry,), failures = continued(models, windows, kept, folder)
    assert not failures
    prompt = windows[0, 32:64].tolist()
    assert entry["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True), "the same for both"
    said = greedy(models["student"], prompt, tokenizer.eos_token_id)[:32]
    assert entry["student"] == tokenizer.decode(said, skip_special_tokens=True) != ""
    with pytest.raises(ValueError, match="max_new_tokens"):
        _continue(models["student"], windows[0, :64], tokenizer.eos_token_id)


def test_a_model_that_fails_is_named_and_the_others_go_on(
    seed: int, tokenized: TokenizedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    models = {"teacher": tiny(seed, 32), "student": tiny(seed + 1, 16)}
    windows = torch.randint(1, 400, (4, 65), generator=torch.Generator().manual_seed(seed))
    kept = torch.ones(4, 64, dtype=torch.bool)
    whole = continued(models, windows, kept, folder).texts

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no cache for this one")

    monkeypatch.setattr(models["teacher"], "generate", fail)
    texts, failures = continued(models, windows, kept, folder)
    assert failures == {"teacher": "RuntimeError: no cache for this one"}
    assert texts == [entry | {"teacher": None} for entry in whole]


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
