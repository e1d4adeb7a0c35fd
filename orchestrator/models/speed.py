"""Inference speed of a model, measured in the same way for every model."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from orchestrator.labels.answer import Answer
from orchestrator.plan.memory import head_rows

PASSES, LONG_ENOUGH_S = 3, 5.0
"""Passes that are timed at most, and seconds after which no more of them is begun."""


@torch.inference_mode()
def tokens_per_s(answers: Callable[[torch.Tensor], Answer], ids: torch.Tensor) -> float:
    """Positions of `ids` [rows, seq] by the seconds of the fastest pass through `answers`, all logits included.

    The first pass builds caches and is not timed. On a GPU the clock is read when the device has done its work.
    """
    _pass(answers, ids)
    seconds: list[float] = []
    while len(seconds) < PASSES and sum(seconds) < LONG_ENOUGH_S:
        started = time.perf_counter()
        _pass(answers, ids)
        seconds.append(time.perf_counter() - started)
    return ids.numel() / min(seconds)


def _pass(answers: Callable[[torch.Tensor], Answer], ids: torch.Tensor) -> None:
    answer = answers(ids)
    for states in answer.states.flatten(0, 1).split(head_rows(answer.vocab_size, answer.states.is_cuda)):
        answer.head(states)
    if answer.states.is_cuda:
        torch.cuda.synchronize(answer.states.device)
