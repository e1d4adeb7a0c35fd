"""Figures by token: bins that hold what they should, and numbers equal to those of whole distributions in float64."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from orchestrator.evaluate.answers import Whole
from orchestrator.evaluate.samples import SAMPLE_TOKENS, SAMPLES, TOP, sample_rows, sample_text
from orchestrator.evaluate.tokens import TeacherComparison, by_entropy, kl_histogram
from tests.conftest import TokenizedCorpus

VOCAB = 400


def tiny(seed: int, width: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def reference(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """[positions, vocab]: log-probabilities in float64 of the model's own logits."""
    return model(input_ids=windows[:, :-1]).logits.double().log_softmax(-1).flatten(0, 1)


def test_histogram_counts_every_token_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    kl = {"student": random.lognormal(-3, 3, 10_000), "baseline": random.lognormal(-1, 2, 10_000)}
    kl["student"][:5] = (-1e-9, 0.0, 1e-4, kl["student"].max(), 1e-12)
    found = kl_histogram(kl)
    edges = found["edges_nats"]
    assert edges[0] == 0 and edges[1] == pytest.approx(1e-4) and edges[-1] > max(v.max() for v in kl.values())
    assert np.diff(np.log10(edges[1:])) == pytest.approx(np.full(len(edges) - 2, 0.2))
    for name, values in kl.items():
        naive = [int(((values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
        naive[0] += int((values < 0).sum())
        assert found[name] == naive and sum(naive) == 10_000


def test_entropy_bins_hold_equally_many_tokens_and_their_means(seed: int) -> None:
    random = np.random.default_rng(seed)
    entropy = random.gamma(2, 1, 5_000)
    student = TeacherComparison(entropy * random.random(5_000), random.random(5_000) < np.exp(-entropy))
    found = by_entropy(entropy, {"student": student})
    assert sum(found["tokens"]) == 5_000 and all(abs(n - 500) <= 1 for n in found["tokens"]) and len(found["tokens"]) == 10
    edges = [*found["edges_nats"][:-1], np.inf]
    inside = [(entropy >= a) & (entropy < b) for a, b in pairwise(edges)]
    assert found["tokens"] == [part.sum() for part in inside]
    for name, values in (("top1_agreement", student.same_top1), ("kl_to_teacher_nats", student.kl_nats)):
        assert found["student"][name] == pytest.approx([values[part].mean() for part in inside])
    assert found["student"]["top1_agreement"][0] > found["student"]["top1_agreement"][-1]


def test_entropies_that_are_equal_share_a_bin() -> None:
    entropy = np.array([0.0] * 90 + [1.0] * 10)
    found = by_entropy(entropy, {"student": TeacherComparison(entropy, entropy == 0)})
    assert sum(found["tokens"]) == 100 and all(found["tokens"])
    alone = by_entropy(np.ones(3), {"student": TeacherComparison(np.ones(3), np.ones(3) > 0)})
    assert alone["tokens"] == [3] and alone["student"]["top1_agreement"] == [1.0]


def test_samples_spell_the_text_and_hold_the_models_predictions(seed: int, tokenized: TokenizedCorpus) -> None:
    folder: Path = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "def f(x):\n\treturn 'é🙂 日本'  # comment\n" * 8
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids[: SAMPLE_TOKENS + 1])
    theirs, ours = (reference(tiny(seed + i, width), ids[None]) for i, width in enumerate((32, 16)))
    sample = sample_text(Whole(theirs.float()), ours.float(), ids[1:], tokenizer)
    assert len(sample) == len(ids) - 1
    spelled = "".join(t.text for t in sample)
    assert text.startswith(tokenizer.decode(ids[:1].tolist()) + spelled) and "🙂" in spelled
    assert any(t.text == "" for t in sample)
    for i, token in enumerate(sample):
        assert token.teacher == pytest.approx(float(theirs[i, ids[i + 1]].exp()), rel=1e-3)
        assert token.student == pytest.approx(float(ours[i, ids[i + 1]].exp()), rel=1e-3)
        assert token.kl_nats == pytest.approx(float((theirs[i].exp() * (theirs[i] - ours[i])).sum()), abs=1e-4)
        top = theirs[i].topk(TOP)
        assert [g.probability for g in token.teacher_top] == pytest.approx(top.values.exp().tolist(), rel=1e-3)
        assert [g.text for g in token.teacher_top] == [
            tokenizer.decode([j], skip_special_tokens=False) for j in top.indices.tolist()
        ]


def test_shown_windows_are_spread_evenly() -> None:
    assert sample_rows(SAMPLES * 10) == {0, 10, 20} and sample_rows(2) == {0, 1}
