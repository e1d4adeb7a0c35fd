"""Held-out text token by token: what teacher and student expected in each place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from orchestrator.labels.answer import Answer

SAMPLES, SAMPLE_TOKENS, TOP = 3, 96, 3

Answers = Callable[[torch.Tensor], Answer]
"""What a model says about ids [rows, seq]."""


@dataclass(frozen=True)
class Guess:
    """A token that a model holds likely."""

    text: str
    probability: float


@dataclass(frozen=True)
class SampleToken:
    """A token of the text, and the predictions that were made for its place."""

    text: str
    """Empty for a token that ends inside a character; the token that ends it has it."""
    kl_nats: float
    """KL(teacher ‖ student)."""
    teacher: float
    """Probability that the teacher gave this token."""
    student: float
    teacher_top: tuple[Guess, ...]
    """The `TOP` most likely tokens, most likely first."""
    student_top: tuple[Guess, ...]


@torch.inference_mode()
def sample_text(teacher: Answers, student: Answers, windows: torch.Tensor, tokenizer: Tokenizer) -> list[list[SampleToken]]:
    """The beginnings of `SAMPLES` of `windows` [rows, seq + 1], evenly chosen; their first tokens are context alone."""
    count = min(SAMPLES, len(windows))
    return [_sample(teacher, student, windows[i * len(windows) // count, : SAMPLE_TOKENS + 1], tokenizer) for i in range(count)]


def _sample(teacher: Answers, student: Answers, ids: torch.Tensor, tokenizer: Tokenizer) -> list[SampleToken]:
    """The tokens after the first of `ids` [n + 1]; holds [n, vocab] of both models, and n is small."""
    said = (speaker(ids[None, :-1]) for speaker in (teacher, student))
    theirs, ours = (answer.head(answer.states[0]).log_softmax(-1) for answer in said)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).tolist()
    chances = [log_probs.gather(1, ids[1:, None])[:, 0].exp().tolist() for log_probs in (theirs, ours)]
    guesses = [_guesses(tokenizer, log_probs) for log_probs in (theirs, ours)]
    return [SampleToken(*token) for token in zip(_pieces(tokenizer, ids[1:].tolist()), kl, *chances, *guesses, strict=True)]


def _guesses(tokenizer: Tokenizer, log_probs: torch.Tensor) -> list[tuple[Guess, ...]]:
    """By position of `log_probs` [n, vocab]."""
    top = log_probs.topk(TOP)
    return [
        tuple(Guess(tokenizer.decode([i], skip_special_tokens=False), p) for i, p in zip(ids, probs, strict=True))
        for ids, probs in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    ]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each of `ids` adds to the text."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, i) or "" for i in ids]
