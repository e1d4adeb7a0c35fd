"""Relation losses against float64 loops in numpy: values, gradients, what they do not see, and degenerate states."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch

from orchestrator.errors import SpecError
from orchestrator.losses.relations import cka, gram, minilm, relation, rkd_angle, rkd_distance

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor], Tensor]
N, WIDTH, TEACHER_WIDTH = 6, 4, 7
ROWS, SEQ, HEADS = 3, 5, 2
ROW_WIDTH, TEACHER_ROW_WIDTH = 4, 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    return normal(seed, n, TEACHER_WIDTH), normal(seed + 1, n, WIDTH)


def rows(seed: int) -> tuple[Tensor, Tensor]:
    return normal(seed, ROWS, SEQ, TEACHER_ROW_WIDTH), normal(seed + 1, ROWS, SEQ, ROW_WIDTH)


def minilm2(teacher: Tensor, student: Tensor) -> Tensor:
    return minilm(teacher, student, HEADS)


# The references.


def huber(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def reference_distance(teacher: np.ndarray, student: np.ndarray) -> float:
    def relative(x: np.ndarray) -> dict[tuple[int, int], float]:
        far = {(i, j): math.dist(x[i], x[j]) for i, j in permutations(range(len(x)), 2)}
        return {pair: d / (sum(far.values()) / len(far)) for pair, d in far.items()}

    ours, theirs = relative(student), relative(teacher)
    return sum(huber(ours[pair], theirs[pair]) for pair in ours) / len(ours)


def reference_angle(teacher: np.ndarray, student: np.ndarray) -> float:
    def cos(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b) / math.sqrt(a @ a) / math.sqrt(b @ b)

    triples = list(permutations(range(len(teacher)), 3))
    return sum(huber(cos(student, *triple), cos(teacher, *triple)) for triple in triples) / len(triples)


def reference_gram(teacher: np.ndarray, student: np.ndarray) -> float:
    def cos(x: np.ndarray, i: int, j: int) -> float:
        return float(x[i] @ x[j]) / math.sqrt(x[i] @ x[i]) / math.sqrt(x[j] @ x[j])

    n = len(teacher)
    return sum((cos(teacher, i, j) - cos(student, i, j)) ** 2 for i in range(n) for j in range(n)) / n**2


def reference_cka(teacher: np.ndarray, student: np.ndarray) -> float:
    """HSIC by its definition, tr(K H L H) / (n - 1)^2."""

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        n = len(a)
        h = np.eye(n) - 1 / n
        k, m = ([[sum(u * v for u, v in zip(x[i], x[j], strict=True)) for j in range(n)] for i in range(n)] for x in (a, b))
        return float(np.trace(np.array(k) @ h @ np.array(m) @ h)) / (n - 1) ** 2

    return 1 - hsic(teacher, student) / math.sqrt(hsic(teacher, teacher) * hsic(student, student))


def reference_relation(x: np.ndarray, heads: int) -> np.ndarray:
    """Probabilities [heads, seq, seq] of one row [seq, width]."""
    seq, width = x.shape
    size = width // heads
    found = np.zeros((heads, seq, seq))
    for h in range(heads):
        part = x[:, h * size : (h + 1) * size]
        for i in range(seq):
            weights = [math.exp(float(part[i] @ part[j]) / math.sqrt(size)) for j in range(i + 1)]
            found[h, i, : i + 1] = np.array(weights) / sum(weights)
    return found


def reference_minilm(teacher: np.ndarray, student: np.ndarray) -> list[float]:
    losses = []
    for t, s in zip(teacher, student, strict=True):
        p, q = reference_relation(t, HEADS), reference_relation(s, HEADS)
        terms = [p[h, i, j] * math.log(p[h, i, j] / q[h, i, j]) for h in range(HEADS) for i in range(SEQ) for j in range(i + 1)]
        losses.append(sum(terms) / HEADS / SEQ)
    return losses


ON_POINTS: dict[str, tuple[Loss, Callable[..., float]]] = {
    "distance": (rkd_distance, reference_distance),
    "angle": (rkd_angle, reference_angle),
    "gram": (gram, reference_gram),
    "cka": (cka, reference_cka),
}


@pytest.mark.parametrize("name", ON_POINTS)
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_values_and_gradients_on_points(seed: int, name: str, spread: float) -> None:
    """With one point far away, some differences are in the linear part of the Huber loss."""
    loss, reference = ON_POINTS[name]
    teacher, student = points(seed)
    teacher[0] *= spread**2
    value = loss(teacher, student)
    assert value.shape == ()
    assert float(value) == pytest.approx(reference(teacher.numpy(), student.numpy()), rel=1e-10)
    assert float(value) > 1e-6
    assert torch.autograd.gradcheck(loss, [teacher.clone().requires_grad_(), student.clone().requires_grad_()], eps=1e-7)


def test_the_linear_part_of_the_huber_loss_is_reached(seed: int) -> None:
    teacher, student = points(seed)
    teacher[0] *= 25
    distances = [torch.pdist(x) / torch.pdist(x).mean() for x in (teacher, student)]
    assert (distances[0] - distances[1]).abs().max() > 1


@pytest.mark.parametrize("name", ON_POINTS)
def test_which_point_is_which_matters(seed: int, name: str) -> None:
    loss, _ = ON_POINTS[name]
    teacher, student = points(seed)
    value, order = float(loss(teacher, student)), torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    assert float(loss(teacher, student.roll(1, 0))) != pytest.approx(value, rel=1e-6)
    assert float(loss(teacher[order], student[order])) == pytest.approx(value, rel=1e-10), "both in another order"
    assert float(loss(student, student)) == pytest.approx(0, abs=1e-12)
    assert float(loss(student, student.roll(1, 0))) > 1e-6
    with pytest.raises(ValueError, match="5 states"):
        loss(teacher[:5], student)


@pytest.mark.parametrize("name", ON_POINTS)
def test_what_is_not_seen_on_points(seed: int, name: str) -> None:
    loss, _ = ON_POINTS[name]
    teacher, student = points(seed)
    value = float(loss(teacher, student))
    rotation = torch.linalg.qr(normal(seed + 2, WIDTH, WIDTH)).Q
    away = student + 10 * normal(seed + 3, WIDTH)
    assert float(loss(teacher, student @ rotation)) == pytest.approx(value, rel=1e-9)
    assert float(loss(teacher * 3.7, student * 0.01)) == pytest.approx(value, rel=1e-9)
    assert (float(loss(teacher, away)) == pytest.approx(value, rel=1e-6)) == (name != "gram")
    assert (float(loss(teacher, student * normal(seed + 4, N, 1).exp())) == pytest.approx(value, rel=1e-6)) == (name == "gram")
    assert float(loss(teacher, student @ normal(seed + 5, WIDTH, WIDTH))) != pytest.approx(value, rel=1e-6)


def test_ranges(seed: int) -> None:
    """Of cka, both ends; of angles, a straight line of points against a right angle, by hand."""
    assert float(cka(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]))) == 1.0
    teacher, _ = points(seed)
    rotation = torch.linalg.qr(normal(seed + 2, TEACHER_WIDTH, TEACHER_WIDTH)).Q
    assert float(cka(teacher, torch.nn.functional.pad(2 * teacher @ rotation + 1, (0, 3)))) == pytest.approx(0, abs=1e-12)
    straight, right = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    corners = [huber(1, 0), huber(1, 0.5**0.5), huber(-1, 0)]
    assert float(rkd_angle(straight, right)) == pytest.approx((corners[2] + 2 * corners[1]) / 3)


# Degenerate points.


def measured(loss: Loss, teacher: Tensor, student: Tensor) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(teacher, leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient


@pytest.mark.parametrize("name", ON_POINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_points_and_zeros_are_finite(seed: int, name: str, dtype: torch.dtype) -> None:
    loss, _ = ON_POINTS[name]
    teacher, student = (x.to(dtype) for x in points(seed))
    pair, near, zero, one = student.clone(), student.clone(), student.clone(), student.clone()
    pair[1], near[1], zero[2], one[:] = pair[0], near[0] + 1e-7, 0, one[0]
    tiny = student * torch.finfo(dtype).tiny
    for case in (pair, near, zero, one, tiny, torch.zeros_like(student), student * 1e-15, student * 1e4):
        for other in (teacher, torch.zeros_like(teacher), teacher[:1].expand(N, -1)):
            value, gradient = measured(loss, other, case)
            assert math.isfinite(value) and value >= -1e-6 and torch.isfinite(gradient).all()
    assert measured(loss, teacher, one)[1].abs().max() == 0 or name == "gram", "nothing says where to go"


def test_equal_points(seed: int) -> None:
    """A pair at distance zero counts as such; its own term pulls nowhere, and the others' gradients are still right."""
    teacher, student = points(seed)
    student[1] = student[0]
    value, gradient = measured(rkd_distance, teacher, student)
    assert value == pytest.approx(reference_distance(teacher.numpy(), student.numpy()), rel=1e-10)
    assert gradient.abs().max() > 1e-6
    step = 1e-6 * normal(seed + 2, WIDTH)  # moves both alike, so that they stay equal
    moved = student.clone()
    moved[:2] += step
    change = reference_distance(teacher.numpy(), moved.numpy()) - value
    assert change == pytest.approx(float((gradient[:2] * step).sum()), rel=1e-3, abs=1e-10)


def test_few_points(seed: int) -> None:
    """One point has no relation to any other, two have no angle: zero, with a gradient of zero; cka is 1."""
    for n in (0, 1, 2):
        for name, (loss, _) in ON_POINTS.items():
            value, gradient = measured(loss, *points(seed, n))
            if n < 2 or name == "angle":
                assert value == pytest.approx(1 if name == "cka" else 0, abs=1e-15)
                assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-15)
            elif name != "gram":
                assert value == pytest.approx(0, abs=1e-12), "two points are always alike up to scale"


@pytest.mark.parametrize("name", ON_POINTS)
def test_bf16_points_are_summed_in_fp32(seed: int, name: str) -> None:
    loss, reference = ON_POINTS[name]
    teacher, student = (x.bfloat16() for x in points(seed))
    value = loss(teacher, student)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(reference(teacher.double().numpy(), student.double().numpy()), rel=1e-4, abs=1e-5)


# MiniLM relations.


def test_relation(seed: int) -> None:
    x = normal(seed, ROWS, SEQ, TEACHER_ROW_WIDTH)
    for heads in (1, 2, 3, 6):
        found = relation(x, heads)
        expected = np.stack([reference_relation(row, heads) for row in x.numpy()])
        assert np.allclose(found.exp(), expected, rtol=1e-12, atol=1e-15)
        assert (torch.isinf(found) == torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)).all()
        assert torch.allclose(found.exp().sum(-1), torch.ones(ROWS, heads, SEQ, dtype=torch.float64))
    for heads in (0, 4):
        with pytest.raises(SpecError, match=f"{TEACHER_ROW_WIDTH} .* {heads} "):
            relation(x, heads)


def test_minilm(seed: int) -> None:
    teacher, student = rows(seed)
    value = minilm2(teacher, student)
    assert value.shape == (ROWS,)
    assert np.allclose(value, reference_minilm(teacher.numpy(), student.numpy()), rtol=1e-10)
    assert torch.autograd.gradcheck(minilm2, [teacher.clone().requires_grad_(), student.clone().requires_grad_()])
    assert torch.allclose(minilm2(student, student), torch.zeros(ROWS, dtype=torch.float64), atol=1e-14)
    for dim in range(3):
        assert not torch.allclose(minilm2(teacher, student.roll(1, dim)), value, rtol=1e-3)
    assert not torch.allclose(minilm2(teacher, 2 * student), value, rtol=1e-3), "length is seen"
    assert not torch.allclose(minilm(teacher, student, 1), value, rtol=1e-3), "heads are seen"
    with pytest.raises(ValueError, match="states"):
        minilm2(teacher[:1], student)


def test_relations_do_not_see_what_comes_later(seed: int) -> None:
    x = normal(seed, ROWS, SEQ, ROW_WIDTH)
    whole = relation(x, HEADS)
    for cut in range(SEQ):
        changed = x.clone()
        changed[:, cut:] = normal(seed + 1, ROWS, SEQ - cut, ROW_WIDTH)
        other = relation(changed, HEADS)
        assert torch.allclose(other[:, :, :cut].exp(), whole[:, :, :cut].exp(), rtol=1e-12, atol=0)
        assert cut == 0 or not torch.allclose(other[:, :, cut:].exp(), whole[:, :, cut:].exp(), rtol=1e-3)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(relation(leaf, HEADS)[:, :, 2, 0].sum(), leaf)
    assert not gradient[:, 3:].any() and gradient[:, :3].abs().max() > 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4])
def test_minilm_is_finite(seed: int, scale: float) -> None:
    """Zeros, all positions equal, one position, and scores so far apart that probabilities vanish, in fp32."""
    teacher, student = (x.float() for x in rows(seed))
    equal = student[:, :1].expand(-1, SEQ, -1)
    for other in (teacher, torch.zeros_like(teacher), teacher * 1e4):
        for ours in (student, equal):
            leaf = (ours * scale).requires_grad_()
            value = minilm2(other, leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
            assert (value >= -1e-5).all()
    leaf = (student[:, :1] * scale).requires_grad_()
    value = minilm2(teacher[:, :1], leaf)
    assert not value.any() and not torch.autograd.grad(value.sum(), leaf)[0].any()


def test_minilm_in_bf16(seed: int) -> None:
    teacher, student = (x.bfloat16() for x in rows(seed))
    value = minilm2(teacher, student)
    assert value.dtype == torch.float32
    assert np.allclose(value, reference_minilm(teacher.double().numpy(), student.double().numpy()), rtol=1e-4, atol=1e-5)
