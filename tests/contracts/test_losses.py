"""The objective through the chunked head, against dense float64 references written in probabilities, and by differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import LabelKind, label_kind
from orchestrator.labels.layout import Frame
from orchestrator.labels.targets import Dense, Hidden, Sparse, Targets
from orchestrator.losses import head as chunked
from orchestrator.losses.divergence import FUNCTIONS
from orchestrator.losses.head import Head, chunked_loss
from orchestrator.losses.objective import Mixture
from orchestrator.losses.schedule import combined
from orchestrator.spec.labels import DenseLabels, HiddenLabels, Labels, SampledLabels, TopkLabels
from orchestrator.spec.objective import AdaptiveKl, Divergence, ForwardKl, Jsd, ReverseKl, ReverseSkewKl, SkewKl, TotalVariation

Tensor = torch.Tensor
VOCAB, WIDTH, TEACHER_WIDTH, POSITIONS = 61, 6, 9, 25
ROWS_PER_CHUNK = 7
TEMPERATURES = (1.0, 2.0)
LABELS: dict[str, Labels] = {
    "sampled": SampledLabels(temperatures=TEMPERATURES),
    "topk": TopkLabels(kind="topk", k=8, temperatures=TEMPERATURES),
    "renormalized": TopkLabels(kind="topk", k=8, temperatures=TEMPERATURES, renormalize=True),
    "dense": DenseLabels(kind="dense", dtype="fp32"),
    "hidden": HiddenLabels(kind="hidden"),
}
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKl(),
    "reverse_kl": ReverseKl(kind="reverse_kl"),
    "jsd": Jsd(kind="jsd", beta=0.3),
    "jsd-0": Jsd(kind="jsd", beta=0.0),
    "jsd-1": Jsd(kind="jsd", beta=1.0),
    "skew_kl": SkewKl(kind="skew_kl", skew=0.1),
    "reverse_skew_kl": ReverseSkewKl(kind="reverse_skew_kl", skew=0.2),
    "tvd": TotalVariation(kind="tvd"),
    "akl": AdaptiveKl(kind="akl", head_mass=0.5),
}
ALLOWED = [
    (labels, name)
    for labels in LABELS
    for name in DIVERGENCES
    if labels not in ("sampled", "renormalized") or name == "forward_kl"
]
HEADS = {"plain": (False, 1.0, None), "bias": (True, 1.0, None), "scaled": (False, 0.7, None), "capped": (True, 1.3, 4.0)}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "head_rows", lambda *_: ROWS_PER_CHUNK)
    monkeypatch.setattr(chunked, "NARROWED_AT_A_TIME", 5)


@dataclass(frozen=True)
class Case:
    """A student's hidden states and head, hard labels, and the teacher's hidden states and head, in float64."""

    hidden: Tensor
    head: Head
    target: Tensor
    teacher_states: Tensor
    teacher_head: Head

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_head(self.teacher_states)

    def logits(self) -> Tensor:
        """The student's, written out once more, so that autograd sees it."""
        z = self.hidden @ self.head.weight.T
        z = self.head.scale * (z if self.head.bias is None else z + self.head.bias)
        return z if self.head.softcap is None else self.head.softcap * torch.tanh(z / self.head.softcap)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.head.weight, self.head.bias) if t is not None]


def make_case(seed: int, head: str = "plain", scale: float = 3.0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias, factor, softcap = HEADS[head]
    student = Head(normal(VOCAB, WIDTH).requires_grad_(), normal(VOCAB).requires_grad_() if bias else None, factor, softcap)
    target = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    teacher = Head(normal(VOCAB, TEACHER_WIDTH))
    return Case(
        normal(POSITIONS, WIDTH).requires_grad_(), student, target, normal(POSITIONS, TEACHER_WIDTH) * scale / 3, teacher
    )


def soft_labels(case: Case, labels: str, temperature: float, salt: str = "") -> Targets:
    """What the codec of `labels` keeps of the teacher, one row of all positions, flattened."""
    kind = label_kind(LABELS[labels], Frame(VOCAB, POSITIONS, case.teacher_head))
    answer = Answer(case.teacher_states[None], case.teacher_head, VOCAB)
    arrays = kind.extract(answer, [f"row{salt}".encode().ljust(16)])
    targets = kind.targets(kind.unpack(kind.pack(arrays)), temperature)
    return targets.map(lambda t: t.flatten(0, 1))


def measured(case: Case, mixture: Mixture, soft: Targets | None) -> tuple[Tensor, list[Tensor]]:
    """Sums (loss, CE, divergence) and the loss's gradients through the chunked head."""

    def score(logits: Tensor, part: slice) -> Tensor:
        return mixture.score(logits, case.target[part], None if soft is None else soft.map(lambda t: t[part]))

    sums = chunked_loss(case.hidden, case.head, score)
    return sums.detach(), list(torch.autograd.grad(sums[0], case.leaves))


# The reference: probabilities, float64, no chunks, gradients by autograd through nothing of ours.


def reference_divergence(spec: Any, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 1e-29, a * (a.clamp_min(1e-30) / b).log(), torch.zeros_like(a)).sum(-1)

    if spec.kind == "jsd":
        m = spec.beta * p + (1 - spec.beta) * q
        return {0.0: kl(p, q), 1.0: kl(q, p)}.get(spec.beta, spec.beta * kl(p, m) + (1 - spec.beta) * kl(q, m))
    if spec.kind == "skew_kl":
        return kl(p, spec.skew * p + (1 - spec.skew) * q)
    if spec.kind == "reverse_skew_kl":
        return kl(q, spec.skew * q + (1 - spec.skew) * p)
    if spec.kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    if spec.kind == "akl":
        shares = []
        for a, b in zip(p.tolist(), q.tolist(), strict=True):
            order, mass, head, gaps = np.argsort(a)[::-1], 0.0, 0.0, 0.0
            for i in order:
                gap = abs(a[i] - b[i])
                head, gaps, mass = head + (gap if mass < spec.head_mass else 0.0), gaps + gap, mass + a[i]
            shares.append(head / gaps)
        share = torch.tensor(shares, dtype=torch.float64)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    return kl(p, q) if spec.kind == "forward_kl" else kl(q, p)


def reference_events(soft: Targets, q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's probabilities of the same events."""
    if isinstance(soft, Sparse):
        p = soft.probs.double()
        kept = torch.stack([q[n, ids] for n, ids in enumerate(soft.ids)])
        if soft.tail is None:
            return p, kept
        return torch.cat([p, soft.tail.double()[:, None]], 1), torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
    logits = soft.logits if isinstance(soft, Dense) else soft.head(soft.states)
    return (logits.double() / temperature).softmax(-1), q


def reference(
    case: Case, alpha: float, soft_weight: float, temperature: float, specs: list[Any], soft: Targets
) -> tuple[Tensor, list[Tensor]]:
    z = case.logits()
    ce = -z.softmax(-1)[torch.arange(POSITIONS), case.target].log().sum()
    p, q = reference_events(soft, (z / temperature).softmax(-1), temperature)
    value = sum(spec.weight * reference_divergence(spec, p, q).sum() for spec in specs)
    loss = alpha * ce + soft_weight * value
    gradients = torch.autograd.grad(loss, case.leaves)
    return torch.stack([loss, ce, torch.as_tensor(value)]).detach(), list(gradients)


def agree(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]], rtol: float = 1e-6) -> bool:
    pairs = [(one[0], other[0]), *zip(one[1], other[1], strict=True)]
    return all(torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol * float(b.abs().max())) for a, b in pairs)


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


# The chunked head.


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
def test_nothing_of_all_tokens_by_the_vocabulary_is_ever_alive(seed: int, labels: str, head: str) -> None:
    case, mixture = make_case(seed, head), Mixture(0.2, 0.8, 2.0, combined((ForwardKl(),)))
    soft = soft_labels(case, labels, 2.0)
    given = 0 if not isinstance(soft, Dense) else soft.logits.numel()
    with Widest() as ours:
        measured(case, mixture, soft)
    assert ours.entries <= max(ROWS_PER_CHUNK * VOCAB, VOCAB * TEACHER_WIDTH, given)
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
