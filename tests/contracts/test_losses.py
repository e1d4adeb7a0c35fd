"""The objective against a dense float64 reference with hand-written gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from orchestrator.labels.kinds import LabelKind, label_kind
from orchestrator.losses.divergence import cross_entropy, log_remainder, sparse_forward_kl
from orchestrator.losses.objective import Mixture, Soft
from orchestrator.spec.distill import SampledLabels, TopkLabels

VOCAB = 61
POSITIONS = 12
TEMPERATURES = (1.0, 2.0)
KINDS = ["sampled", "topk"]


def label(kind: str) -> LabelKind:
    if kind == "sampled":
        return label_kind(SampledLabels(temperatures=TEMPERATURES), VOCAB)
    return label_kind(TopkLabels(kind="topk", k=8, temperatures=TEMPERATURES), VOCAB)


@dataclass(frozen=True)
class Case:
    """Student logits, hard labels and the teacher's logits of the same positions."""

    student: torch.Tensor
    target: torch.Tensor
    teacher: torch.Tensor

    def soft(self, kind: str, temperature: float, salt: int = 0) -> Soft:
        codec = label(kind)
        columns = codec.encode(self.teacher[None], [f"row {salt}".encode().ljust(16)])
        targets = codec.decode(columns, temperature)
        return targets.ids[0], targets.probs[0], None if targets.tail is None else targets.tail[0]


@pytest.fixture
def case(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(POSITIONS, VOCAB, generator=generator) * 2,
        torch.randint(VOCAB, (POSITIONS,), generator=generator),
        torch.randn(POSITIONS, VOCAB, generator=generator) * 3,
    )


# The reference: numpy, float64, one position at a time, gradients from the formulas.


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference_ce(logits: np.ndarray, target: int) -> tuple[float, np.ndarray]:
    q = softmax(logits)
    gradient = q.copy()
    gradient[target] -= 1
    return -math.log(q[target]), gradient


def reference_kl(
    logits: np.ndarray, temperature: float, t: np.ndarray, tail: float | None, kept: np.ndarray
) -> tuple[float, np.ndarray]:
    """KL(t || q) at `temperature` and its gradient by the logits; with `tail`, all ids not in `kept` are one event."""
    q = softmax(logits / temperature)
    value = sum(t[i] * math.log(t[i] / q[i]) for i in np.flatnonzero(t))
    gradient = q * t.sum() - t
    if tail is not None:
        rest = np.ones(len(q), dtype=bool)
        rest[kept] = False
        remainder = q[rest].sum()
        value += tail * math.log(tail / remainder) if tail > 0 else 0.0
        gradient += tail * (q - np.where(rest, q / remainder, 0))
    return value, gradient / temperature


def reference(case: Case, mixture: Mixture, soft: Soft) -> tuple[float, float, float, np.ndarray]:
    """(loss, CE, KL, gradient of the loss), summed over positions."""
    _, probs, tail = (None if part is None else part.double().numpy() for part in soft)
    ce = kl = 0.0
    gradients = []
    scale = mixture.temperature**2 if mixture.temperature_squared else 1.0
    for n, logits in enumerate(case.student.double().numpy()):
        t = np.zeros(VOCAB)
        np.add.at(t, soft[0][n].numpy(), probs[n])
        hard, hard_gradient = reference_ce(logits, int(case.target[n]))
        kept = soft[0][n].numpy()
        value, gradient = reference_kl(logits, mixture.temperature, t, None if tail is None else float(tail[n]), kept)
        ce, kl = ce + hard, kl + value
        gradients.append(mixture.alpha * hard_gradient + (1 - mixture.alpha) * scale * gradient)
    return mixture.alpha * ce + (1 - mixture.alpha) * scale * kl, ce, kl, np.stack(gradients)


def measured(case: Case, mixture: Mixture, soft: Soft | None) -> tuple[float, float, float, np.ndarray]:
    logits = case.student.clone().requires_grad_()
    loss, ce, kl = mixture(logits, case.target, soft)
    assert not ce.requires_grad
    assert not kl.requires_grad
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), float(ce), float(kl), logits.grad.double().numpy()


def agree(one: tuple[float, float, float, np.ndarray], other: tuple[float, float, float, np.ndarray]) -> bool:
    values = np.allclose(one[:3], other[:3], rtol=1e-5, atol=1e-5)
    return bool(values and np.allclose(one[3], other[3], rtol=1e-4, atol=2e-6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_value_and_gradient_equal_the_dense_reference(
    case: Case, kind: str, temperature: float, squared: bool, alpha: float
) -> None:
    mixture, soft = Mixture(alpha, temperature, squared), case.soft(kind, temperature)
    expected = reference(case, mixture, soft)
    assert agree(measured(case, mixture, soft), expected)
    shifted = tuple(None if part is None else part.roll(1, 0) for part in soft)
    wrong = measured(case, mixture, shifted)  # type: ignore[arg-type]
    assert not agree(wrong, expected), "labels of the position before must be noticed"


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_the_loss_and_what_does_not(case: Case, kind: str) -> None:
    soft = case.soft(kind, 2.0)
    squared, plain = measured(case, Mixture(0.0, 2.0, True), soft), measured(case, Mixture(0.0, 2.0, False), soft)
    assert np.allclose(squared[3], 4 * plain[3], rtol=1e-6)
    assert squared[2] == plain[2], "the KL that is reported is not scaled"
    assert not agree(measured(case, Mixture(0.0, 1.0, False), soft), plain)
    assert not agree(measured(case, Mixture(0.1, 2.0, False), soft), plain)
    hard, alone = measured(case, Mixture(1.0, 2.0, True), soft), measured(case, Mixture(0.3, 2.0, True), None)
    assert np.allclose(hard[3], alone[3], atol=1e-7), "without soft labels it is plain cross entropy, whatever alpha says"
    assert alone[0] == alone[1]
    assert alone[2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(case: Case, dtype: torch.dtype) -> None:
    rounded = Case(case.student.to(dtype).float(), case.target, case.teacher)
    mixture, soft = Mixture(0.3, 2.0, True), case.soft("topk", 2.0)
    half = mixture(case.student.to(dtype), case.target, soft)
    assert [float(part) for part in half] == [float(part) for part in mixture(rounded.student, case.target, soft)]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sampled_gradients_average_to_the_full_one(case: Case, temperature: float) -> None:
    """The mean over many draws is p_student - p_teacher, within Bernstein's bound, and that of top-k labels is not."""
    draws, samples = 2000, 50
    student, teacher = (torch.tensor(x.numpy()).double() / temperature for x in (case.student, case.teacher))
    p, full = teacher.softmax(-1).numpy(), (student.softmax(-1) - teacher.softmax(-1)).numpy() / temperature
    mixture, kind = Mixture(0.0, temperature, False), label("sampled")
    columns = kind.encode(case.teacher.expand(draws, -1, -1), [f"row {draw}".encode().ljust(16) for draw in range(draws)])
    targets = kind.decode(columns, temperature)
    many = Case(case.student.repeat(draws, 1), case.target.repeat(draws), case.teacher)
    gradients = measured(many, mixture, (targets.ids.flatten(0, 1), targets.probs.flatten(0, 1), None))[3]
    mean = gradients.reshape(draws, *full.shape).mean(0)
    fraction = p * samples - np.floor(p * samples)
    deviation = np.sqrt(2 * fraction * (1 - fraction) / samples**2 * 27 / draws) + 2 * 27 / (3 * samples * draws)
    bound = deviation / temperature + 1e-6
    assert (np.abs(mean - full) <= bound).all()
    assert (np.abs(mean - np.roll(full, 1, axis=0)) > bound).any()
    assert (np.abs(measured(case, mixture, case.soft("topk", temperature))[3] - full) > bound).any(), (
        "8 ids and a tail are biased"
    )


# The divergences alone, in float64, where autograd can be checked against differences.


def leaf(case: Case) -> torch.Tensor:
    return case.student.double().requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_gradcheck(case: Case, kind: str) -> None:
    ids, probs, tail = case.soft(kind, 1.0)
    exact = (ids, probs.double(), None if tail is None else tail.double())
    assert torch.autograd.gradcheck(lambda z: sparse_forward_kl(z.log_softmax(-1), *exact), (leaf(case),))
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z.log_softmax(-1), case.target), (leaf(case),))
    assert torch.autograd.gradcheck(lambda z: log_remainder(z.log_softmax(-1)[:, :20]), (leaf(case),))


def test_kl_of_a_teacher_to_itself_is_zero(case: Case) -> None:
    log_probs = case.teacher.double().log_softmax(-1)
    everything = torch.arange(VOCAB).expand(POSITIONS, -1)
    complete = sparse_forward_kl(log_probs, everything, log_probs.exp(), None)
    assert complete.abs().max() < 1e-12
    top, ids = log_probs.topk(8)
    kl = sparse_forward_kl(log_probs, ids, top.exp(), 1 - top.exp().sum(-1))
    assert kl.abs().max() < 1e-12
    assert (sparse_forward_kl(log_probs.roll(1, 0), ids, top.exp(), 1 - top.exp().sum(-1)) > 0.01).all()


def test_the_tail_bucket_bounds_the_full_kl_from_below(case: Case) -> None:
    teacher, student = case.teacher.double().log_softmax(-1), case.student.double().log_softmax(-1)
    full = (teacher.exp() * (teacher - student)).sum(-1)
    last = torch.zeros(POSITIONS, dtype=torch.float64)
    for k in (1, 4, 16, VOCAB - 1):
        top, ids = teacher.topk(k)
        kl = sparse_forward_kl(student, ids, top.exp(), (1 - top.exp().sum(-1)).clamp_min(0))
        assert (kl >= last - 1e-9).all(), "more ids, a closer bound"
        assert (kl <= full + 1e-9).all()
        last = kl
    assert torch.allclose(last, full, atol=1e-6)


def test_unused_places_change_nothing(case: Case) -> None:
    ids, probs, _ = case.soft("sampled", 1.0)
    padded = (torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(probs, (0, 5)), None)
    mixture = Mixture(0.2, 1.0, True)
    assert agree(measured(case, mixture, padded), measured(case, mixture, (ids, probs, None)))


@pytest.mark.parametrize("sure", ["teacher", "student", "both", "on different ids"])
def test_certainty_keeps_everything_finite(sure: str) -> None:
    """All mass on one id leaves no remainder: the loss is bounded and its gradient a number."""
    steep = torch.zeros(POSITIONS, VOCAB)
    steep[:, 3] = 200.0
    other = steep.roll(5, 1) if sure == "on different ids" else steep
    flat = torch.zeros(POSITIONS, VOCAB)
    case = Case(other if sure != "teacher" else flat, torch.full((POSITIONS,), 3), steep if sure != "student" else flat)
    for kind in KINDS:
        for temperature in TEMPERATURES:
            loss, _, kl, gradient = measured(case, Mixture(0.1, temperature, True), case.soft(kind, temperature))
            assert math.isfinite(loss)
            assert kl >= -1e-4
            assert np.isfinite(gradient).all()


def test_every_id_kept_is_a_full_kl(case: Case) -> None:
    kind = label_kind(TopkLabels(kind="topk", k=VOCAB), VOCAB)
    targets = kind.decode(kind.encode(case.teacher[None], [b""]), 1.0)
    assert targets.tail is not None
    soft = (targets.ids[0], targets.probs[0], targets.tail[0])
    _, _, kl, gradient = measured(case, Mixture(0.0, 1.0, True), soft)
    p, q = case.teacher.double().softmax(-1), case.student.double().softmax(-1)
    assert kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3), "log-probabilities are kept in fp16"
    assert np.abs(gradient - (q - p).numpy()).max() < 2e-3
