"""The objective against dense float64 references written in probabilities, and by differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import LabelKind, label_kind
from orchestrator.labels.layout import Frame
from orchestrator.labels.targets import Dense, Hidden, Sparse, Targets
from orchestrator.losses.divergence import FUNCTIONS
from orchestrator.losses.objective import Mixture
from orchestrator.losses.schedule import combined
from orchestrator.spec.objective import ForwardKl, ReverseKl, TotalVariation
from tests.contracts.dense_reference import (
    ALLOWED,
    DIVERGENCES,
    HEADS,
    LABELS,
    POSITIONS,
    TEMPERATURES,
    VOCAB,
    Tensor,
    agree,
    make_case,
    measured,
    reference,
    soft_labels,
)

pytestmark = pytest.mark.usefixtures("rows_per_chunk")


@pytest.mark.parametrize("labels,name", ALLOWED)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_and_gradients_equal_the_dense_reference(seed: int, labels: str, name: str, temperature: float) -> None:
    for head in HEADS:
        case, spec = make_case(seed, head), DIVERGENCES[name]
        soft = soft_labels(case, labels, temperature)
        mixture = Mixture(0.3, 0.7 * temperature**2, temperature, combined((spec,)))
        expected = reference(case, 0.3, 0.7 * temperature**2, temperature, [spec], soft)
        assert agree(measured(case, mixture, soft), expected), head
        shifted = soft.map(lambda t: t.roll(1, 0))
        assert not agree(measured(case, mixture, shifted), expected, 1e-3), "labels of the position before must be noticed"


@pytest.mark.parametrize("labels,name", [(labels, name) for labels, name in ALLOWED if name != "akl"])
def test_gradients_equal_differences(seed: int, labels: str, name: str) -> None:
    """Not for AKL: its weights are constants by definition, and differences would see them move."""
    case, step = make_case(seed, "capped"), 1e-5
    soft, mixture = soft_labels(case, labels, 2.0), Mixture(0.3, 0.7, 2.0, combined((DIVERGENCES[name],)))
    _, gradients = measured(case, mixture, soft)
    generator = torch.Generator().manual_seed(seed + 1)
    for leaf, gradient in zip(case.leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            leaf.data.add_(direction, alpha=sign * step)
            values.append(float(measured(case, mixture, soft)[0][0]))
            leaf.data.sub_(direction, alpha=sign * step)
        slope = float((gradient * direction).sum())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-4, abs=1e-4)


def test_a_weighted_mixture_is_the_weighted_sum(seed: int) -> None:
    case = make_case(seed)
    specs = (ForwardKl(weight=0.25), ReverseKl(kind="reverse_kl", weight=0.5), TotalVariation(kind="tvd", weight=0.25))
    for labels in ("topk", "hidden"):
        soft = soft_labels(case, labels, 1.0)
        expected = reference(case, 0.1, 0.9, 1.0, list(specs), soft)
        assert agree(measured(case, Mixture(0.1, 0.9, 1.0, combined(specs)), soft), expected)


def test_interpolated_targets_lie_between_student_and_teacher(seed: int) -> None:
    """TAID: a forward KL to softmax((1 - t) student + t teacher), whose gradient does not pass through the target."""
    case, t = make_case(seed), 0.4
    soft = soft_labels(case, "hidden", 2.0)
    assert isinstance(soft, Hidden)
    mixture = Mixture(0.1, 0.9, 2.0, combined((ForwardKl(),)), teacher_share=torch.tensor(t, dtype=torch.float64))
    z, teacher = case.logits(), soft.head(soft.states).double()
    mixed = Dense(2.0 * ((1 - t) * z.detach() + t * teacher) / 2.0)
    expected = reference(case, 0.1, 0.9, 2.0, [ForwardKl()], mixed)
    assert agree(measured(case, mixture, soft), expected)
    assert not agree(measured(case, Mixture(0.1, 0.9, 2.0, combined((ForwardKl(),))), soft), expected, 1e-3)


# What must hold whatever the formula.


def test_divergences_are_zero_at_the_teacher_and_positive_elsewhere(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(40, VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for name, spec in DIVERGENCES.items():
        function = FUNCTIONS[spec.kind](spec)
        assert function(teacher, teacher).abs().max() < 1e-12, name
        assert (function(teacher, student) > 1e-4).all(), name


def merged(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of `ids` and of everything else as one event."""
    rest = log_probs.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, ids), rest], 1)


def test_events_bound_a_divergence_from_below(seed: int) -> None:
    """Merging events can only hide differences: top-k with tail is at most the divergence on the vocabulary."""
    case = make_case(seed)
    teacher, student = case.teacher_logits.log_softmax(-1), case.logits().detach().log_softmax(-1)
    for name, spec in DIVERGENCES.items():
        if name == "akl":
            continue  # its weights depend on the events
        function, last = FUNCTIONS[spec.kind](spec), torch.zeros(POSITIONS, dtype=torch.float64)
        full = function(teacher, student)
        for k in (1, 4, 16, VOCAB - 1):
            ids = teacher.topk(k).indices
            value = function(merged(teacher, ids), merged(student, ids))
            assert (value >= last - 1e-9).all(), (name, "more ids, a closer bound")
            assert (value <= full + 1e-9).all(), name
            last = value
        assert torch.allclose(last, full, atol=1e-6), name


def test_what_changes_the_loss_and_what_does_not(seed: int) -> None:
    case, divergence = make_case(seed), combined((ForwardKl(),))
    for labels in LABELS:
        soft = soft_labels(case, labels, 2.0)
        scaled, plain = (measured(case, Mixture(0.0, weight, 2.0, divergence), soft) for weight in (4.0, 1.0))
        assert torch.allclose(scaled[1][0], 4 * plain[1][0])
        assert scaled[0][2] == plain[0][2], "the divergence that is reported is not scaled"
        assert not agree(measured(case, Mixture(0.0, 1.0, 1.0, divergence), soft), plain, 1e-3)
        hard, alone = measured(case, Mixture(1.0, 0.0, 2.0, divergence), soft), measured(case, Mixture(), None)
        assert torch.allclose(hard[1][0], alone[1][0], atol=1e-9)
        assert alone[0][0] == alone[0][1]
        assert alone[0][2] == 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sampled_gradients_average_to_the_full_one(seed: int, temperature: float) -> None:
    """The mean over 2,000 draws is p_student - p_teacher, within Bernstein's bound, and that of top-k labels is not."""
    draws, samples = 2000, 50
    case = make_case(seed)
    student, teacher = case.logits().detach() / temperature, case.teacher_logits.float().double() / temperature
    p, full = teacher.softmax(-1).numpy(), (student.softmax(-1) - teacher.softmax(-1)).numpy() / temperature
    kind = label_kind(LABELS["sampled"], Frame(VOCAB, POSITIONS))
    answer = Answer.of_logits(case.teacher_logits.expand(draws, -1, -1))
    targets = kind.targets(kind.extract(answer, [f"row {draw}".encode().ljust(16) for draw in range(draws)]), temperature)
    mixture = Mixture(0.0, 1.0, temperature, combined((ForwardKl(),)))

    def gradient(soft: Targets, repeats: int) -> np.ndarray:
        logits = case.logits().detach().repeat(repeats, 1)
        mixture.score(logits, case.target.repeat(repeats), soft)
        return logits.reshape(repeats, *full.shape).mean(0).numpy()

    mean = gradient(targets.map(lambda t: t.flatten(0, 1)), draws)
    fraction = p * samples - np.floor(p * samples)
    deviation = np.sqrt(2 * fraction * (1 - fraction) / samples**2 * 27 / draws) + 2 * 27 / (3 * samples * draws)
    bound = deviation / temperature + 1e-6
    assert (np.abs(mean - full) <= bound).all()
    assert (np.abs(mean - np.roll(full, 1, axis=0)) > bound).any()
    for biased in ("topk", "renormalized"):
        assert (np.abs(gradient(soft_labels(case, biased, temperature), 1) - full) > bound).any(), biased


@pytest.mark.parametrize("margin", [5.0, 15.0, 20.0])
def test_a_tail_that_the_student_has_given_up_still_pulls(seed: int, margin: float) -> None:
    """fp32 against float64: a student that puts all its mass on kept ids is drawn to the others as much as it should be."""
    case = make_case(seed)
    soft = soft_labels(case, "topk", 1.0)
    assert isinstance(soft, Sparse)
    logits = case.logits().detach().scatter(1, soft.ids[:, :1], margin + float(case.logits().detach().max()))
    mixture = Mixture(0.0, 1.0, 1.0, combined((ForwardKl(),)))
    exact, rounded = logits.clone(), logits.float()
    sums = [mixture.score(z, case.target, soft) for z in (exact, rounded)]
    assert torch.allclose(exact, rounded.double(), rtol=1e-3, atol=1e-6)
    assert float(sums[1][2]) == pytest.approx(float(sums[0][2]), rel=1e-5)
    rest = torch.ones_like(exact).scatter(1, soft.ids, 0.0)
    q = logits.softmax(-1)
    expected = ((q * rest).sum(1) - soft.tail.double()) if soft.tail is not None else None
    assert torch.allclose((exact * rest).sum(1), expected, atol=1e-9), "on the others together: student's mass less teacher's"


def test_unused_places_change_nothing(seed: int) -> None:
    case, mixture = make_case(seed), Mixture(0.2, 0.8, 1.0, combined((ForwardKl(),)))
    soft = soft_labels(case, "sampled", 1.0)
    assert isinstance(soft, Sparse)
    padded = Sparse(torch.nn.functional.pad(soft.ids, (0, 5)), torch.nn.functional.pad(soft.probs, (0, 5)), None)
    assert agree(measured(case, mixture, padded), measured(case, mixture, soft))


@pytest.mark.parametrize("sure", ["teacher", "student", "both", "on different ids"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_certainty_keeps_everything_finite(sure: str, name: str) -> None:
    """All mass on one id leaves nothing for the others: the loss is bounded and its gradient a number, in fp32."""
    steep = torch.zeros(POSITIONS, VOCAB)
    steep[:, 3] = 200.0
    flat, other = torch.zeros(POSITIONS, VOCAB), steep.roll(5, 1) if sure == "on different ids" else steep
    student, teacher = flat if sure == "teacher" else other, flat if sure == "student" else steep
    for labels in [labels for labels, allowed in ALLOWED if allowed == name]:
        if labels == "hidden":
            continue  # the same as dense from here on
        for temperature in TEMPERATURES:
            kind: LabelKind = label_kind(LABELS[labels], Frame(VOCAB, POSITIONS))
            soft = kind.targets(kind.extract(Answer.of_logits(teacher[None]), [bytes(16)]), temperature)
            gradient = student.clone()
            mixture = Mixture(0.1, 0.9, temperature, combined((DIVERGENCES[name],)))
            sums = mixture.score(gradient, torch.full((POSITIONS,), 3), soft.map(lambda t: t.flatten(0, 1)))
            assert math.isfinite(float(sums[0])), labels
            assert float(sums[2]) >= -1e-3, labels
            assert torch.isfinite(gradient).all(), labels
