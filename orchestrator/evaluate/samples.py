"""Held-out text token by token: what teacher and student expected in each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from orchestrator.evaluate.answers import Distribution, Whole

SAMPLES, SAMPLE_TOKENS, TOP = 3, 96, 3


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


def sample_rows(rows: int) -> set[int]:
    """Which of `rows` windows are shown: `SAMPLES` of them, evenly chosen."""
    count = min(SAMPLES, rows)
    return {i * rows // count for i in range(count)}


def sample_text(teacher: Distribution, student: torch.Tensor, targets: torch.Tensor, tokenizer: Tokenizer) -> list[SampleToken]:
    """The tokens `targets` [n], with what was expected in their places; `student` are its log-probabilities [n, vocab]."""
    chances = [said.log_probs_of(targets).exp().tolist() for said in (teacher, Whole(student))]
    guesses = [_guesses(tokenizer, said) for said in (teacher, Whole(student))]
    kl = teacher.divergence(student).tolist()
    return [SampleToken(*token) for token in zip(_pieces(tokenizer, targets.tolist()), kl, *chances, *guesses, strict=True)]


def _guesses(tokenizer: Tokenizer, said: Distribution) -> list[tuple[Guess, ...]]:
    """By position."""
    probs, ids = said.top(TOP)
    return [
        tuple(Guess(tokenizer.decode([i], skip_special_tokens=False), p) for i, p in zip(*guesses, strict=True))
        for guesses in zip(ids.tolist(), probs.tolist(), strict=True)
    ]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each of `ids` adds."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, i) or "" for i in ids]
