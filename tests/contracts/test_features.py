"""Losses on hidden states and across vocabularies, against float64 loops in numpy; projectors and layer maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.errors import SpecError
from orchestrator.losses.crosstokenizer import uld
from orchestrator.losses.features import Projector, activation_clone, cosine, layer_map, mse, unit

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor], Tensor]
POSITIONS, WIDTH, TEACHER_WIDTH = 7, 5, 9


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(seed: int) -> tuple[Tensor, Tensor]:
    """Of teacher and student, [POSITIONS, WIDTH] each."""
    return normal(seed, POSITIONS, WIDTH), normal(seed + 1, POSITIONS, WIDTH)


def distributions(seed: int, teacher_vocab: int, student_vocab: int) -> tuple[Tensor, Tensor]:
    return normal(seed, POSITIONS, teacher_vocab).softmax(-1), normal(seed + 1, POSITIONS, student_vocab).softmax(-1)


def reference_mse(teacher: np.ndarray, student: np.ndarray) -> list[float]:
    return [sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / len(t) for t, s in zip(teacher, student, strict=True)]


def reference_cosine(teacher: np.ndarray, student: np.ndarray) -> list[float]:
    losses = []
    for t, s in zip(teacher, student, strict=True):
        dot = sum(a * b for a, b in zip(t, s, strict=True))
        losses.append(1 - dot / math.sqrt(sum(a * a for a in t)) / math.sqrt(sum(b * b for b in s)))
    return losses


def reference_uld(teacher: np.ndarray, student: np.ndarray) -> list[float]:
    losses = []
    for p, q in zip(teacher.tolist(), student.tolist(), strict=True):
        vocab = max(len(p), len(q))
        ranked = (sorted(x + [0.0] * (vocab - len(x)), reverse=True) for x in (p, q))
        losses.append(sum(abs(a - b) for a, b in zip(*ranked, strict=True)))
    return losses


CASES: dict[str, tuple[Loss, Callable[..., list[float]], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mse": (mse, reference_mse, states),
    "cosine": (cosine, reference_cosine, states),
    "uld, larger teacher": (uld, reference_uld, lambda seed: distributions(seed, 11, 6)),
    "uld, larger student": (uld, reference_uld, lambda seed: distributions(seed, 6, 11)),
    "uld, equal": (uld, reference_uld, lambda seed: distributions(seed, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(seed: int, name: str) -> None:
    loss, reference, make = CASES[name]
    teacher, student = make(seed)
    value = loss(teacher, student)
    assert value.shape == (POSITIONS,)
    assert np.allclose(value, reference(teacher.numpy(), student.numpy()), rtol=1e-12, atol=1e-14)
    leaves = [teacher.clone().requires_grad_(), student.clone().requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-9)  # so small that none of the kinks of ULD is near


@pytest.mark.parametrize("name", CASES)
def test_positions_matter(seed: int, name: str) -> None:
    loss, _, make = CASES[name]
    teacher, student = make(seed)
    moved = loss(teacher, student.roll(1, 0))
    assert not torch.allclose(moved, loss(teacher, student), rtol=1e-3)
    assert not torch.allclose(moved.sum(), loss(teacher, student).sum(), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_equal_states_cost_nothing_and_few_positions_work(seed: int, name: str) -> None:
    loss, _, make = CASES[name]
    teacher, student = make(seed)
    assert torch.allclose(loss(student, student), torch.zeros(POSITIONS, dtype=torch.float64), atol=1e-14)
    for n in (0, 1):
        assert torch.equal(loss(teacher[:n], student[:n]), loss(teacher, student)[:n])


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_summed_in_fp32(seed: int, name: str) -> None:
    loss, reference, make = CASES[name]
    teacher, student = (x.bfloat16() for x in make(seed))
    value = loss(teacher, student)
    assert value.dtype == torch.float32
    assert np.allclose(value, reference(teacher.double().numpy(), student.double().numpy()), rtol=1e-5, atol=1e-6)


def test_what_each_does_not_see(seed: int) -> None:
    teacher, student = states(seed)
    scales = normal(seed + 2, 2, POSITIONS, 1).exp()
    assert torch.allclose(cosine(teacher * scales[0], student * scales[1]), cosine(teacher, student), atol=1e-12)
    assert torch.allclose(cosine(teacher, -teacher), torch.full((POSITIONS,), 2.0, dtype=torch.float64))
    assert not torch.allclose(mse(teacher, student * 1.1), mse(teacher, student), rtol=1e-3)
    assert torch.allclose(mse(teacher.repeat(1, 3), student.repeat(1, 3)), mse(teacher, student)), "width is averaged over"
    p, q = distributions(seed, 11, 6)
    assert torch.allclose(uld(p.roll(3, 1), q.flip(1)), uld(p, q), atol=1e-14)
    certain = torch.eye(6, dtype=torch.float64)
    assert torch.equal(uld(certain, certain.roll(1, 0)), torch.zeros(6, dtype=torch.float64)), "which token is not seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_of_zero(dtype: torch.dtype) -> None:
    """Zero and next to zero: finite values and gradients; a direction that is none has a cosine of zero."""
    for length in (0.0, torch.finfo(dtype).tiny, 1e-20, 1e-15, 1e-10):
        student = torch.tensor([[length, 0.0]], dtype=dtype, requires_grad=True)
        for direction in ([1.0, 1.0], [0.0, 0.0], [1e-20, 0.0]):
            value = cosine(torch.tensor([direction], dtype=dtype), student)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all(), (length, direction)
            if not length:
                assert value.tolist() == [1.0] and gradient.tolist() == [[0.0, 0.0]]
    assert unit(torch.tensor([[1e-10, 0.0]], dtype=dtype)).tolist() == [[1.0, 0.0]]


def test_shapes_must_agree(seed: int) -> None:
    student = normal(seed, POSITIONS, WIDTH)
    for loss in (mse, cosine, lambda t, s: activation_clone(t, s, None)):
        for width in (1, TEACHER_WIDTH):  # 1 would be broadcast
            with pytest.raises(SpecError, match=f"{width}.*{WIDTH}"):
                loss(normal(seed, POSITIONS, width), student)
        with pytest.raises(ValueError, match="states"):
            loss(normal(seed, 1, WIDTH), student)


# Projectors.


def test_projector_starts(seed: int) -> None:
    same = Projector(WIDTH, WIDTH, seed)
    x = normal(seed, POSITIONS, WIDTH).float()
    assert torch.equal(same(x), x)
    assert same.weight.requires_grad and len(list(same.parameters())) == 1
    wider, narrower = Projector(WIDTH, TEACHER_WIDTH, seed).weight, Projector(TEACHER_WIDTH, WIDTH, seed).weight
    assert wider.shape == (TEACHER_WIDTH, WIDTH) and narrower.shape == (WIDTH, TEACHER_WIDTH)
    assert torch.allclose(wider.T @ wider, torch.eye(WIDTH), atol=1e-6)
    assert torch.allclose(narrower @ narrower.T, torch.eye(WIDTH), atol=1e-6)
    assert torch.allclose(Projector(WIDTH, TEACHER_WIDTH, seed)(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_projector_depends_on_its_seed_alone(seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    first = Projector(WIDTH, TEACHER_WIDTH, seed).weight
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(seed + 1)
    assert torch.equal(first, Projector(WIDTH, TEACHER_WIDTH, seed).weight)
    assert not torch.allclose(first, Projector(WIDTH, TEACHER_WIDTH, seed + 1).weight, atol=1e-2)


def test_projector_has_no_preferred_direction(seed: int) -> None:
    """Mean over 400 maps: zero within six standard deviations, each entry's square 1 / target within the same."""
    weights = torch.stack([Projector(3, 8, seed + i).weight.detach() for i in range(400)]).double()
    assert weights.mean(0).abs().max() < 6 / math.sqrt(8 * 400)
    assert (weights.square().mean(0) - 1 / 8).abs().max() < 6 * math.sqrt(2) / 8 / math.sqrt(400)


def test_projector_learns_the_map(seed: int) -> None:
    """Least squares through it finds a linear relation that is there; gradients pass to the states as well."""
    x = normal(seed, 40, WIDTH).float()
    target = x @ normal(seed + 1, WIDTH, TEACHER_WIDTH).float()
    learned = Projector(WIDTH, TEACHER_WIDTH, seed)
    start = float(mse(target, learned(x)).mean().detach())
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        mse(target, learned(x)).mean().backward()
        optimizer.step()
    assert float(mse(target, learned(x)).mean().detach()) < 1e-2 * start
    with pytest.raises(SpecError, match=f"{WIDTH}, got {TEACHER_WIDTH}"):
        learned(target)
    assert Projector(WIDTH, TEACHER_WIDTH, seed)(x.bfloat16()).dtype == torch.float32


def test_activation_clone(seed: int) -> None:
    teacher, student = normal(seed, POSITIONS, TEACHER_WIDTH), normal(seed + 1, POSITIONS, WIDTH)
    down = Projector(TEACHER_WIDTH, WIDTH, seed).double()
    weight = down.weight.detach().numpy()
    projected = np.array([[sum(w * a for w, a in zip(row, t, strict=True)) for row in weight] for t in teacher.numpy()])
    value = activation_clone(teacher, student, down)
    assert np.allclose(value.detach(), reference_mse(projected, student.numpy()), rtol=1e-12)
    assert torch.equal(activation_clone(student, student.flip(0), None), mse(student, student.flip(0)))

    def through(weight: Tensor, student: Tensor) -> Tensor:
        return torch.func.functional_call(_Clone(down), {"down.weight": weight}, (teacher, student))

    assert torch.autograd.gradcheck(through, [down.weight.detach().clone().requires_grad_(), student.requires_grad_()])


class _Clone(torch.nn.Module):
    def __init__(self, down: Projector) -> None:
        super().__init__()
        self.down = down

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        return activation_clone(teacher, student, self.down)


# Layer maps.


@pytest.mark.parametrize(
    ("teacher", "student", "how", "expected"),
    [
        (12, 4, "uniform", ((1, 3), (2, 6), (3, 9), (4, 12))),
        (6, 4, "uniform", ((1, 2), (2, 3), (3, 5), (4, 6))),  # 1.5 and 4.5 are rounded up
        (5, 5, "uniform", tuple((i, i) for i in range(1, 6))),
        (2, 5, "uniform", ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2))),  # 0.4 is no layer
        (30, 1, "uniform", ((1, 30),)),
        (12, 4, "last", ((4, 12),)),
        (12, 4, [(4, 11), (1, 1), (2, 1)], ((4, 11), (1, 1), (2, 1))),
    ],
)
def test_layer_maps(teacher: int, student: int, how: Any, expected: Sequence[tuple[int, int]]) -> None:
    assert layer_map(teacher, student, how) == expected


def test_uniform_maps_are_even() -> None:
    for teacher in range(1, 20):
        for student in range(1, 20):
            pairs = layer_map(teacher, student, "uniform")
            assert [s for s, _ in pairs] == list(range(1, student + 1))
            assert pairs[-1] == (student, teacher)
            assert all(1 <= t <= teacher and (abs(t - s * teacher / student) <= 0.5 or t == 1) for s, t in pairs)
            if student <= teacher:
                assert len({t for _, t in pairs}) == student


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ([(1, 1), (5, 2)], "student layer 5 .* not in 1..4"),
        ([(0, 1)], "student layer 0 "),
        ([(1, 13)], "teacher layer 13 .* not in 1..12"),
        ([(2, 0)], "teacher layer 0 "),
        ([(2, 3), (1, 3), (2, 7)], "student layer 2 is there twice"),
        ([], "pairs"),
        ("first", "'first'"),
    ],
)
def test_wrong_layer_maps(how: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        layer_map(12, 4, how)
    with pytest.raises(SpecError, match="got 0 and 4"):
        layer_map(0, 4, "last")
