"""What is shown while a run goes on: the figures of the report, so far; and at a stage's end, the report's own."""

from __future__ import annotations

import pytest

from orchestrator.display import Display

TOKENS_A_STEP = 100.0


def rates(seconds: float, waited: float, steps: int = 1) -> dict[str, float]:
    """What a training posts about once a second."""
    pace = {"train/tokens_per_s": steps * TOKENS_A_STEP / seconds, "train/label_wait_fraction": waited / seconds}
    return {"train/loss": 3.0, "train/interval_s": seconds, **pace}


@pytest.fixture
def display() -> Display:
    shown = Display(live=False)
    shown.stage_started("student")
    shown.expect("student", 20)
    return shown


def detail(display: Display) -> str:
    return display._rows["student"].detail()


def test_speed_and_waiting_are_those_of_all_steps_but_the_first(display: Display) -> None:
    """Fault of kind: one word for two figures. The line said "waits 0%" in a run whose student had waited 37 % of its time."""
    display.point("student", 0, rates(seconds=30.0, waited=29.0))  # starting up: not counted in the report either
    assert "waits" not in detail(display)
    display.point("student", 1, rates(seconds=4.0, waited=3.0))
    display.point("student", 2, {"train/loss": 2.5})
    display.point("student", 6, rates(seconds=6.0, waited=0.7, steps=5))
    assert detail(display).startswith("7/20  loss 3.0000  60 tokens/s  waits 37%"), "6 steps in 10 s, 3.7 s of them waiting"


def test_a_worker_that_starts_again_is_not_counted_as_slow(display: Display) -> None:
    for step, seconds in ((10, 9.0), (11, 1.0), (12, 1.0)):
        display.point("student", step, rates(seconds, waited=0.0))
    display.point("student", 11, rates(seconds=50.0, waited=40.0))
    display.point("student", 12, rates(seconds=2.0, waited=1.0))
    assert "  50 tokens/s  waits 50%" in detail(display)


def test_last_line_is_the_true_end(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault of kind: a last line that was written before the last figures had come."""
    for step in range(17):
        display.point("student", step, rates(seconds=1.0, waited=0.0))
    capsys.readouterr()
    figures = {"steps": 20.0, "final_loss_nats": 2.125, "tokens_per_s": 5018.4, "label_wait_fraction": 0.366}
    display.stage_finished("student", "ran", 96.0, figures)
    assert capsys.readouterr().err == "student   ran       96.0 s  20 steps  loss 2.1250  5,018 tokens/s  waits 37%\n"


def test_labels_show_their_pool(display: Display) -> None:
    display.stage_started("labels")
    display.expect("labels", 8)
    display.point("labels", 3, {"label/tokens_per_s": 800.0, "label/blocked_fraction": 0.25, "label/bytes_per_token": 72.4})
    assert display._rows["labels"].detail() == "3/8  800 tokens/s  waits 25%  72.4 B/token"
