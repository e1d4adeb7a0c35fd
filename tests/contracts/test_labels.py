"""Label kinds against dense softmax in float64: what is stored is the teacher's distribution, unbiased or bounded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DataError, SpecError
from orchestrator.labels import answer as answers
from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import LabelKind, label_kind
from orchestrator.labels.layout import Arrays, Frame, join
from orchestrator.labels.sampled import draw
from orchestrator.labels.targets import Sparse
from orchestrator.spec.labels import SampledLabels, TopkLabels

LOG_ODDS = 27.0
"""A bound fails to hold once in e^27 / 2 = 10^11 comparisons: a few thousand hold under any seed."""
TIES = 1e-3
"""Share of draws whose point may lie so close to a step of the CDF that fp32 weights fall on its other side."""
LAST = 1 - 2.0**-53
"""The largest float64 below 1."""

SEQ = 0
"""Positions of a row; set where the logits are known."""

METHODS = ["systematic", "multinomial"]
TEMPERATURES = [0.5, 1.0, 2.0]


def sampled_kind(
    vocab: int, samples: int = 50, method: str = "systematic", temperatures: tuple[float, ...] = (1.0,)
) -> LabelKind:
    return label_kind(SampledLabels(samples=samples, method=method, temperatures=temperatures), Frame(vocab, SEQ))


def topk_kind(vocab: int, k: int, temperatures: tuple[float, ...] = (1.0,)) -> LabelKind:
    return label_kind(TopkLabels(kind="topk", k=k, temperatures=temperatures), Frame(vocab, SEQ))


def encode(kind: LabelKind, logits: torch.Tensor, seeds: list[bytes]) -> Arrays:
    """What comes back of the labels of `logits` [rows, seq, vocab] after they were stored."""
    kind._shape = kind._shape._replace(seq_len=logits.shape[1])  # type: ignore[attr-defined]
    arrays = kind.extract(Answer.of_logits(logits), seeds)
    back = kind.unpack(kind.pack(arrays))
    assert same(back, arrays)
    return back


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], values) for name, values in other.items())


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def row_seeds(count: int, salt: int = 0) -> list[bytes]:
    return [f"{salt}:{row}".encode().ljust(16) for row in range(count)]


def softmax64(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.double().numpy() / temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def dense(targets: Sparse, vocab: int) -> np.ndarray:
    """[rows, seq, vocab], float64"""
    out = np.zeros((*targets.ids.shape[:2], vocab))
    for row, position, place in np.ndindex(*targets.ids.shape):
        out[row, position, int(targets.ids[row, position, place])] += float(targets.probs[row, position, place])
    return out


# Drawing.


def cdf_distance(p: np.ndarray, u: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """How far `u` lies outside the CDF's step at `ids`; 0 where a float64 inverse CDF would draw the same id."""
    cdf = p.cumsum(-1)
    upper = np.take_along_axis(cdf, ids, -1)
    lower = upper - np.take_along_axis(p, ids, -1)
    return np.maximum(0, np.maximum(lower - u, u - upper))


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 1000, 4096, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_inverts_the_cdf(seed: int, vocab: int, dtype: torch.dtype) -> None:
    logits = random_logits(seed, 40, vocab).to(dtype)
    u = torch.rand(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, drawn = softmax64(logits.float()), draw(logits, u).numpy()
    reference = np.stack(
        [np.searchsorted(row.cumsum(), points, side="right") for row, points in zip(p, u.numpy(), strict=True)]
    )
    assert drawn.max() < vocab
    assert np.mean(drawn != reference.clip(max=vocab - 1)) <= TIES
    assert cdf_distance(p, u.numpy(), drawn).max() < 1e-6
    if vocab > 32:
        assert cdf_distance(p, u.numpy(), np.roll(drawn, 1, axis=0)).max() > 1e-3, "draws of other rows would be noticed"


@pytest.mark.parametrize("vocab", [3, 32, 37, 100])
@pytest.mark.parametrize("edge", ["first", "last", "every other", "all but one", "whole blocks"])
def test_no_id_without_mass_is_drawn(seed: int, vocab: int, edge: str) -> None:
    ids = torch.arange(vocab)
    hidden = {
        "first": ids < vocab // 2,
        "last": ids > vocab // 2,
        "every other": ids % 2 == 0,
        "all but one": ids != vocab // 2,
        "whole blocks": (ids // 32 % 2 == 0) & (ids > 0),
    }[edge]
    logits = random_logits(seed, 64, vocab).masked_fill(hidden, -math.inf)
    u = torch.rand(64, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u[:, :4] = torch.tensor([0.0, 2.0**-60, 1 - 2.0**-52, LAST], dtype=torch.float64)
    drawn = draw(logits, u)
    assert drawn.max() < vocab
    assert not hidden[drawn].any()
    assert cdf_distance(softmax64(logits), u.numpy(), drawn.numpy()).max() < 1e-6


def test_no_id_without_mass_is_drawn_from_a_block_of_rounding_size() -> None:
    """A block whose whole mass is below half a unit in the last place of the mass before it."""
    logits = torch.full((1, 64), -math.inf)
    logits[0, 3], logits[0, 40] = 0.0, math.log(1.2e-16)
    assert draw(logits, torch.tensor([[0.0, 0.5, LAST]], dtype=torch.float64)).tolist() in ([[3, 3, 3]], [[3, 3, 40]])


@given(st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-math.inf), min_size=1, max_size=80), st.floats(0, LAST))
def test_draw_survives_any_logits(logits: list[float], u: float) -> None:
    values = torch.tensor([logits])
    if torch.isinf(values).all():
        return
    p = softmax64(values)[0]
    points = torch.tensor([[0.0, u, LAST]], dtype=torch.float64)
    for point, drawn in zip(points[0], draw(values, points)[0], strict=True):
        assert logits[int(drawn)] > -math.inf
        assert cdf_distance(p[None], point.numpy()[None, None], drawn.numpy()[None, None]).max() < 1e-6


def test_logits_of_one_id_draw_that_id() -> None:
    for vocab in (1, 33, 4096):
        logits = torch.full((1, 2, vocab), -1e30)
        logits[0, 0, vocab - 1] = logits[0, 1, 0] = 1e30 if vocab == 1 else 50.0
        for method in METHODS:
            kind = sampled_kind(vocab, min(vocab, 50), method)
            targets = kind.targets(encode(kind, logits, row_seeds(1)), 1.0)
            assert targets.ids.tolist() == [[[vocab - 1], [0]]]
            assert targets.probs.tolist() == [[[1.0], [1.0]]]


# Sampled labels.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_counts_sum_to_the_samples(seed: int, method: str, temperature: float) -> None:
    for samples in (1, 7, 50, 255):
        kind = sampled_kind(301, samples, method, (temperature,))
        targets = kind.targets(encode(kind, random_logits(seed, 3, 5, 301), row_seeds(3)), temperature)
        assert targets.tail is None
        counts = targets.probs.double() * samples
        assert (counts - counts.round()).abs().max() < 1e-4
        assert (counts.round().sum(-1) == samples).all()
        assert targets.ids.max() < 301
        for ids, probs in zip(targets.ids.flatten(0, 1), targets.probs.flatten(0, 1), strict=True):
            assert (ids[probs > 0].diff() > 0).all(), "each id once, ascending"
            assert (ids[probs == 0] == 0).all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_systematic_counts_are_floor_or_ceiling(seed: int, temperature: float) -> None:
    logits, samples = random_logits(seed, 8, 16, 67), 50
    kind = sampled_kind(67, samples, "systematic", (temperature,))
    counts = (dense(kind.targets(encode(kind, logits, row_seeds(8, seed)), temperature), 67) * samples).round()
    expected = softmax64(logits, temperature) * samples
    assert (counts >= np.floor(expected - 1e-4)).all()
    assert (counts <= np.ceil(expected + 1e-4)).all()
    multinomial = sampled_kind(67, samples, "multinomial", (temperature,))
    other = (dense(multinomial.targets(encode(multinomial, logits, row_seeds(8, seed)), temperature), 67) * samples).round()
    assert (other > np.ceil(expected + 1e-4)).any(), "independent draws are not bound so"


def mean_of_draws(kind: LabelKind, logits: torch.Tensor, temperature: float, draws: int, salt: int) -> np.ndarray:
    """Mean target over `draws` rows with the same `logits` [seq, vocab]."""
    targets = kind.targets(encode(kind, logits.expand(draws, -1, -1), row_seeds(draws, salt)), temperature)
    total = torch.zeros(logits.shape, dtype=torch.float64)
    for ids, probs in zip(targets.ids, targets.probs, strict=True):
        total.scatter_add_(1, ids, probs.double())
    return total.numpy() / draws


def bound(p: np.ndarray, samples: int, method: str, draws: int) -> np.ndarray:
    """How far the mean of `draws` targets can lie from `p`: Bernstein's inequality, and the rounding of fp32 weights."""
    if method == "systematic":
        fraction = p * samples - np.floor(p * samples)
        variance, largest, n = fraction * (1 - fraction) / samples**2, 1 / samples, draws
    else:
        variance, largest, n = p * (1 - p), 1.0, draws * samples
    return np.sqrt(2 * variance * LOG_ODDS / n) + 2 * largest * LOG_ODDS / (3 * n) + 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_expectation_is_the_teacher(seed: int, method: str, temperature: float) -> None:
    draws, samples, vocab = 3000, 20, 77
    logits = random_logits(seed, 4, vocab)
    kind = sampled_kind(vocab, samples, method, (0.7, temperature))
    mean = mean_of_draws(kind, logits, temperature, draws, seed)
    p, warmer = softmax64(logits, temperature), softmax64(logits, temperature * 1.25)
    assert (np.abs(mean - p) <= bound(p, samples, method, draws)).all()
    assert (np.abs(mean - warmer) > bound(warmer, samples, method, draws)).any(), "a quarter off is noticed"
    at_other = mean_of_draws(kind, logits, 0.7, draws, seed)
    assert (np.abs(at_other - p) > bound(p, samples, method, draws)).any(), "the two temperatures are two draws"


def test_rare_ids_are_drawn_as_often_as_they_should(seed: int) -> None:
    """Half of the mass on ids far below 1/N each: what top-k labels would lose."""
    vocab, draws = 2000, 2500
    logits = torch.zeros(1, vocab)
    logits[0, 0] = math.log(vocab - 1)
    p = softmax64(logits)[0]
    mean = mean_of_draws(sampled_kind(vocab, 10), logits, 1.0, draws, seed)[0]
    assert abs(mean[0] - 0.5) < 1e-4, "N p is whole: systematic draws have no variance"
    assert (np.abs(mean - p)[1:] <= bound(p, 10, "systematic", draws)[1:]).all()
    assert np.count_nonzero(mean) > 0.9 * vocab


def test_a_row_is_labelled_alike_in_any_company(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, seeds = random_logits(seed, 7, 9, 333), row_seeds(7, seed)
    for kind in (
        sampled_kind(333, temperatures=(1.0, 2.0)),
        sampled_kind(333, method="multinomial"),
        topk_kind(333, 20, (1.0, 2.0)),
    ):
        whole = encode(kind, logits, seeds)
        assert same(encode(kind, logits, seeds), whole)
        parts = [encode(kind, logits[a:b], seeds[a:b]) for a, b in ((0, 1), (1, 4), (4, 7))]
        assert same(join(parts), whole)
        assert not same(join(parts[::-1]), whole)
        with monkeypatch.context() as patch:
            patch.setattr(answers, "head_rows", lambda *_: 3)
            assert same(encode(kind, logits, seeds), whole)


@pytest.mark.parametrize("method", METHODS)
def test_draws_differ_between_rows_and_positions_and_temperatures(seed: int, method: str) -> None:
    """Under uniform logits only the seeds can tell draws apart; one row has 50 outcomes a position."""
    kind = sampled_kind(500, 10, method, (1.0, 2.0))
    columns = encode(kind, torch.zeros(4, 40, 500), row_seeds(4, seed))
    rows = [row for temperature in (1.0, 2.0) for row in kind.targets(columns, temperature).ids.tolist()]
    assert len({str(row) for row in rows}) == 8
    assert all(len({str(position) for position in row}) > 10 for row in rows)


# The byte layout.


@given(st.sampled_from([65_536, 65_537, 70_001]), st.data())
def test_sampled_labels_survive_the_round_trip(vocab: int, data: st.DataObject) -> None:
    """Equal mass on as many ids as there are draws: every one must come back, once, where it was put."""
    positions = data.draw(st.lists(st.sets(st.integers(0, vocab - 1), min_size=1, max_size=12), min_size=1, max_size=4))
    logits = torch.full((1, len(positions), vocab), -200.0)
    for position, ids in enumerate(positions):
        logits[0, position, sorted(ids)] = 1.0
    kind = sampled_kind(vocab, 12)
    targets = kind.targets(encode(kind, logits, row_seeds(1)), 1.0)
    for ids, got, probs in zip(positions, targets.ids[0], targets.probs[0], strict=True):
        assert got[probs > 0].tolist() == sorted(ids)
        assert (probs[probs > 0] - 1 / len(ids)).abs().max() < 1 / 12
        assert probs.sum() == pytest.approx(1)


def test_rows_of_different_length_decode_side_by_side(seed: int) -> None:
    kind = sampled_kind(50)
    logits = torch.cat([torch.full((1, 3, 50), 0.0), torch.nn.functional.one_hot(torch.tensor([[4, 5, 6]]), 50) * 100.0])
    both = kind.targets(encode(kind, logits, row_seeds(2, seed)), 1.0)
    assert both.ids.shape == (2, 3, 50)
    assert both.ids[1, :, 0].tolist() == [4, 5, 6]
    assert both.probs[1].sum() == 3
    assert (both.probs[0] == 0.02).all()


# Top-k labels.


def fp16_tolerance(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """Relative error of a probability whose logarithm is kept in fp16 (11 bits), and of the fp32 sums around it."""
    return np.exp(np.abs(log_probs) * 2.0**-11 / temperature) - 1 + 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 10, 64, 199, 200])
def test_topk_is_the_head_of_the_teacher(seed: int, temperature: float, k: int) -> None:
    logits, vocab = random_logits(seed, 4, 6, 200, scale=2.0), 200
    kind = topk_kind(vocab, k, tuple(TEMPERATURES))
    targets = kind.targets(encode(kind, logits, row_seeds(4)), temperature)
    p = softmax64(logits, temperature)
    ids = targets.ids.numpy()
    assert ids.shape == (4, 6, k)
    assert (np.sort(ids) == np.sort(np.argsort(-p, axis=-1, kind="stable")[..., :k])).all()
    head = np.take_along_axis(p, ids, -1)
    largest = fp16_tolerance(np.take_along_axis(np.log(softmax64(logits)), ids, -1), temperature).max(-1, keepdims=True)
    assert (np.abs(targets.probs.numpy() - head) <= 2 * largest * head).all()
    assert targets.tail is not None
    assert np.abs(targets.tail.numpy() - (1 - head.sum(-1))).max() < 3e-6
    assert (targets.probs.double().sum(-1) + targets.tail.double()).numpy() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_trap(seed: int, temperature: float) -> None:
    """What k values at temperature 1 and their leftover cannot give: neither rebuilding is anywhere near."""
    logits, vocab, k = random_logits(seed, 4, 6, 1000, scale=1.5), 1000, 20
    kind = topk_kind(vocab, k, (1.0, temperature))
    columns = encode(kind, logits, row_seeds(4))
    targets, at_one = kind.targets(columns, temperature), kind.targets(columns, 1.0)
    head = np.take_along_axis(softmax64(logits, temperature), targets.ids.numpy(), -1)
    powers = at_one.probs.double().numpy() ** (1 / temperature)
    assert at_one.tail is not None
    leftover = at_one.tail.double().numpy()[..., None] ** (1 / temperature)

    def error(probs: np.ndarray) -> float:
        return float((np.abs(probs - head) / head).max())

    assert error(targets.probs.numpy()) < 0.02
    assert error(powers / powers.sum(-1, keepdims=True)) > 0.2, "renormalised over the k ids"
    assert error(powers / (powers.sum(-1, keepdims=True) + leftover)) > 0.2, "the leftover as one more id"


def test_topk_of_very_flat_and_very_steep_teachers() -> None:
    kind = topk_kind(300, 5, (0.5, 1.0, 100.0))
    logits = torch.zeros(1, 2, 300)
    logits[0, 1, 7] = 1e4
    columns = encode(kind, logits, row_seeds(1))
    for temperature in (0.5, 1.0, 100.0):
        targets = kind.targets(columns, temperature)
        assert targets.tail is not None
        assert torch.isfinite(targets.probs).all()
        assert targets.probs[0, 0].tolist() == pytest.approx([1 / 300] * 5, rel=1e-4)
        assert float(targets.tail[0, 0]) == pytest.approx(295 / 300, rel=1e-5)
        assert (int(targets.ids[0, 1, 0]), float(targets.probs[0, 1, 0]), float(targets.tail[0, 1])) == (7, 1.0, 0.0)


# Nonsense.


@pytest.mark.parametrize("kind", [sampled_kind(60), topk_kind(60, 4)])
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_no_numbers_are_refused(seed: int, kind: LabelKind, values: list[float], dtype: torch.dtype) -> None:
    logits = random_logits(seed, 5, 4, 60).to(dtype)
    encode(kind, logits, row_seeds(5))
    for place, value in enumerate(values):
        logits[3, 2, 10 + place] = value
    with pytest.raises(DataError, match="not finite, first in row 3") as caught:
        encode(kind, logits, row_seeds(5))
    assert caught.value.exit_code == 3


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("labels", [SampledLabels(), TopkLabels(kind="topk", k=9)])
def test_huge_but_finite_logits_are_taken(labels: Any) -> None:
    logits = torch.full((1, 1, 1000), 3e34)
    logits[0, 0, 5] = 3.1e34
    kind = label_kind(labels, Frame(1000, SEQ))
    targets = kind.targets(encode(kind, logits, row_seeds(1)), 1.0)
    assert targets.probs[targets.ids == 5].max() == 1


def test_more_ids_than_the_vocabulary_has_are_refused() -> None:
    topk_kind(60, 60)
    sampled_kind(60, 60)
    with pytest.raises(SpecError, match=r"labels\.samples: 61 exceeds the vocabulary of 60"):
        sampled_kind(60, 61)
    with pytest.raises(SpecError, match=r"labels\.k: 61 exceeds the vocabulary of 60") as caught:
        topk_kind(60, 61)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 1.0000001)])
@pytest.mark.parametrize("labels", [SampledLabels, TopkLabels])
def test_temperatures_that_would_share_a_column_are_refused(labels: Any, temperatures: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="temperatures"):
        labels(**({"kind": "topk"} if labels is TopkLabels else {}), temperatures=temperatures)
