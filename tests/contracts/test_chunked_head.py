"""The chunked head: nothing of all tokens by the vocabulary in memory, gradients that pass through, and bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.labels.targets import Dense
from orchestrator.losses.head import Head, chunked_loss
from orchestrator.losses.objective import Mixture
from orchestrator.losses.schedule import combined
from orchestrator.spec.objective import ForwardKl
from tests.contracts.dense_reference import (
    HEADS,
    LABELS,
    POSITIONS,
    TEACHER_WIDTH,
    VOCAB,
    Case,
    Tensor,
    agree,
    make_case,
    measured,
    soft_labels,
)

pytestmark = pytest.mark.usefixtures("rows_per_chunk")


class Widest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.entries = max(self.entries, value.numel())
        return out


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("head", HEADS)
def test_nothing_of_all_tokens_by_the_vocabulary_is_ever_alive(seed: int, rows_per_chunk: int, labels: str, head: str) -> None:
    case, mixture = make_case(seed, head), Mixture(0.2, 0.8, 2.0, combined((ForwardKl(),)))
    soft = soft_labels(case, labels, 2.0)
    given = 0 if not isinstance(soft, Dense) else soft.logits.numel()
    with Widest() as ours:
        measured(case, mixture, soft)
    assert ours.entries <= max(rows_per_chunk * VOCAB, VOCAB * TEACHER_WIDTH, given)
    with Widest() as full:
        case.logits().logsumexp(-1).sum().backward()
    assert full.entries == POSITIONS * VOCAB, "a full head would be noticed"


def test_loss_scale_and_frozen_weights(seed: int) -> None:
    """The gradient of anything downstream passes through; what needs none gets none; without grad nothing is kept."""
    case, mixture = make_case(seed, "bias"), Mixture()

    def run(head: Head, hidden: Tensor) -> Tensor:
        return chunked_loss(hidden, head, lambda logits, part: mixture.score(logits, case.target[part], None))

    whole = torch.autograd.grad(run(case.head, case.hidden)[0], case.leaves)
    tenth = torch.autograd.grad(run(case.head, case.hidden)[0] / 10, case.leaves)
    assert all(torch.allclose(a, 10 * b) for a, b in zip(whole, tenth, strict=True))
    frozen = Head(case.head.weight.detach(), case.head.bias)
    assert torch.allclose(torch.autograd.grad(run(frozen, case.hidden)[0], case.hidden)[0], whole[0])
    with torch.no_grad():
        assert not run(case.head, case.hidden).requires_grad


@pytest.mark.parametrize("labels", ["sampled", "topk", "hidden"])
def test_bf16_gemms_accumulate_in_fp32(seed: int, labels: str) -> None:
    """bf16 inputs: value and gradients as close to float64 on the same rounded inputs as bf16 logits allow."""
    exact = make_case(seed)
    case = Case(
        exact.hidden.detach().bfloat16().requires_grad_(),
        Head(exact.head.weight.detach().bfloat16().requires_grad_()),
        exact.target,
        exact.teacher_states,
        exact.teacher_head,
    )
    double = Case(
        case.hidden.detach().double().requires_grad_(),
        Head(case.head.weight.detach().double().requires_grad_()),
        exact.target,
        exact.teacher_states,
        exact.teacher_head,
    )
    soft, mixture = soft_labels(exact, labels, 1.0), Mixture(0.3, 0.7, 1.0, combined((ForwardKl(),)))
    one, other = measured(case, mixture, soft), measured(double, mixture, soft)
    assert one[1][1].dtype == torch.bfloat16
    assert agree(one, other, 2e-2)
    assert not agree(one, other, 1e-7), "bf16 is not float64"


def test_hard_labels_alone_equal_torch(seed: int) -> None:
    case = make_case(seed, "capped")
    loss = torch.nn.functional.cross_entropy(case.logits(), case.target, reduction="sum")
    expected = torch.autograd.grad(loss, case.leaves)
    sums, gradients = measured(case, Mixture(), None)
    assert float(sums[0]) == pytest.approx(float(loss.detach()))
    assert all(torch.allclose(a, b) for a, b in zip(gradients, expected, strict=True))
