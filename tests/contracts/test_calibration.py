"""What rates measured on this machine are solved from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.calibration import DEPTHS, StepTime, shallow, solved_rates
from orchestrator.plan.footprint import Rows, activation_bytes_per_token
from orchestrator.plan.layout import layout_of
from orchestrator.plan.make import decoder_of
from orchestrator.plan.sizes import DEFAULTS
from orchestrator.plan.speed import training_flops
from orchestrator.spec.load import load_job
from orchestrator.spec.model import Model

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
MODEL = Model(config={"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4})


def timed(flops_per_s: float, bytes_per_s: float) -> list[tuple[Any, StepTime]]:
    """Both stand-ins as a machine of these rates would run them; the update takes a tenth of a second."""
    job = load_job(JOB)
    layout, rows = layout_of(job.train), Rows(job.train.micro_batch, 1, job.data.seq_len)
    found: list[tuple[Any, StepTime]] = []
    for depth in DEPTHS:
        shape = decoder_of(shallow(MODEL, depth), 4096)
        assert shape is not None
        moved = activation_bytes_per_token(shape, layout, rows.seq_len, on_gpu=False)
        seconds = rows.tokens * (training_flops(shape, rows.seq_len) / flops_per_s + moved / bytes_per_s)
        found.append((shape, StepTime(seconds + 0.1, 0.1)))
    return found


def test_two_depths_give_both_rates() -> None:
    found = timed(flops_per_s=3e9, bytes_per_s=2e9)
    rates = solved_rates(load_job(JOB), found, 7e9)
    assert rates.student_flops_per_s == pytest.approx(3e9, rel=1e-6)
    assert rates.activation_bytes_per_s == pytest.approx(2e9, rel=1e-6)
    assert rates.teacher_flops_per_s == 7e9
    assert rates.update_bytes_per_s == pytest.approx(12 * found[-1][0].total / 0.1)


def test_what_does_not_count_beside_noise_is_left_out() -> None:
    rates = solved_rates(load_job(JOB), timed(flops_per_s=3e9, bytes_per_s=-1e13), 7e9)
    assert rates.activation_bytes_per_s == float("inf")
    assert rates.student_flops_per_s == pytest.approx(3e9, rel=0.01)


def test_a_stand_in_has_a_block_of_each_form() -> None:
    config: dict[str, Any] = {**DEFAULTS["deepseek_v3"], "layer_types": ["full_attention"] * 61}
    shape = decoder_of(shallow(Model(type="deepseek_v3", config=config), 1), 4096)
    assert shape is not None
    assert [block.experts for block in shape.blocks] == [0, 256]
