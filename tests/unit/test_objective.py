"""The objective over the course of training, and which labels can serve it."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.plan.schedule import scheduled
from orchestrator.spec.job import Job
from orchestrator.spec.objective import Objective, Schedule, Taid

CPU = torch.device("cpu")


def test_a_number_stays_and_a_schedule_moves_from_start_to_end() -> None:
    assert [scheduled(0.3, step, 5) for step in range(5)] == [0.3] * 5
    line = Schedule(start=1.0, end=0.0, warmup_steps=2)
    assert [scheduled(line, step, 7) for step in range(7)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    wave = Schedule(kind="cosine", start=2.0, end=4.0)
    assert [scheduled(wave, step, 5) for step in range(5)] == pytest.approx([3 - math.cos(math.pi * s / 4) for s in range(5)])
    assert [scheduled(Schedule(start=1.0, end=0.0, warmup_steps=9), step, 5) for step in range(5)] == [1, 1, 1, 1, 0]


def test_the_weights_of_a_step() -> None:
    objective = Objective(alpha=Schedule(start=0.2, end=0.6), temperature=2.0)
    steps = [ObjectiveSchedule(objective, 3, CPU).at(step) for step in range(3)]
    assert [m.alpha for m in steps] == pytest.approx([0.2, 0.4, 0.6])
    assert [m.soft_weight for m in steps] == pytest.approx([3.2, 2.4, 1.6])
    plain = ObjectiveSchedule(Objective(alpha=0.2, temperature=2.0, temperature_squared=False), 3, CPU).at(0)
    assert plain.soft_weight == pytest.approx(0.8)
    assert plain.teacher_share is None


def taid_by_hand(spec: Taid, steps: int, losses: list[float]) -> list[float]:
    """Shing et al. 2025, algorithm 1, in plain floats."""
    share, mean, before, shares = spec.start, 0.0, None, []
    for step, loss in enumerate(losses):
        shares.append(share)
        if before is not None:
            mean = spec.momentum * mean + (1 - spec.momentum) * (before - loss) / before
            share += spec.rate * (1 - share) / (1 + math.exp(-mean))
        before = loss
        share = min(spec.end, max(share, spec.start + (spec.end - spec.start) * (step + 1) / steps))
    return shares


@pytest.mark.parametrize("rate", [5e-4, 0.2])
def test_taid_follows_its_algorithm_and_never_falls(seed: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = (torch.rand(40, generator=generator, dtype=torch.float64) * 3 + 0.1).tolist()
    spec = Taid(start=0.3, rate=rate, momentum=0.9)
    schedule = ObjectiveSchedule(Objective(taid=spec), 40, CPU)
    shares: list[float] = []
    for step, loss in enumerate(losses):
        share = schedule.at(step).teacher_share
        assert share is not None
        shares.append(float(share))
        schedule.learn(step, torch.tensor(loss))
    assert shares == pytest.approx(taid_by_hand(spec, 40, losses), rel=1e-5)
    assert all(b >= a for a, b in itertools.pairwise(shares))
    line = [0.3 + 0.7 * step / 40 for step in range(40)]
    assert (shares != pytest.approx(line, rel=1e-3)) == (rate > 0.1), "feedback shows where it is strong"


def test_the_state_goes_on_bit_for_bit(seed: int) -> None:
    losses = torch.rand(20, generator=torch.Generator().manual_seed(seed)) + 0.5
    objective = Objective(taid=Taid(rate=0.1))
    through, broken = ObjectiveSchedule(objective, 20, CPU), ObjectiveSchedule(objective, 20, CPU)
    for step, loss in enumerate(losses):
        if step == 9:
            resumed = ObjectiveSchedule(objective, 20, CPU)
            resumed.restore(broken.state())
            broken = resumed
        through.learn(step, loss)
        broken.learn(step, loss)
        assert through.state() == broken.state()
    fresh = ObjectiveSchedule(objective, 20, CPU)
    assert fresh.state() != through.state()


SAMPLED, TOPK, DENSE = {"kind": "sampled"}, {"kind": "topk"}, {"kind": "dense"}
REVERSE = [{"kind": "reverse_kl"}]


@pytest.mark.parametrize(
    "labels,objective,reason",
    [
        (SAMPLED, {"divergences": REVERSE}, "reverse_kl cannot be had from sampled labels: a draw is unbiased only"),
        (
            SAMPLED,
            {"divergences": [{"kind": "forward_kl", "weight": 0.5}, {"kind": "tvd", "weight": 0.5}]},
            "tvd cannot be had",
        ),
        ({**TOPK, "renormalize": True}, {"divergences": REVERSE}, "reverse_kl cannot be had from topk labels: no tail is kept"),
        (TOPK, {"divergences": REVERSE}, None),
        (DENSE, {"divergences": [{"kind": "akl"}], "taid": {}, "temperature": {"start": 4.0, "end": 1.0}}, None),
        (SAMPLED, {"temperature": 2.0}, r"temperature 2\.0 is not in labels\.temperatures \[1\.0\]"),
        ({**SAMPLED, "temperatures": [1.0, 2.0]}, {"temperature": 2.0}, None),
        (TOPK, {"temperature": {"start": 4.0, "end": 1.0}}, "a schedule needs labels.kind dense or hidden"),
        (TOPK, {"taid": {}}, "taid: interpolates whole distributions"),
        (DENSE, {"divergences": [{"kind": "jsd", "weight": 0.7}]}, r"sum to 0\.7 instead of 1"),
        (DENSE, {"taid": {"start": 0.9, "end": 0.5}}, r"start 0\.9 is above end 0\.5"),
        (DENSE, {"alpha": {"start": 0.5, "end": 1.5}}, "must stay between 0 and 1"),
        (DENSE, {"temperature": {"start": 0.0, "end": 1.5}}, "must stay above 0"),
    ],
)
def test_labels_that_cannot_serve_are_refused_with_the_reason(labels: Any, objective: Any, reason: str | None) -> None:
    job = {"name": "x", "labels": labels, "objective": objective}
    if reason is None:
        Job.model_validate_json(json.dumps(job))
        return
    with pytest.raises(ValidationError, match=reason):
        Job.model_validate_json(json.dumps(job))
