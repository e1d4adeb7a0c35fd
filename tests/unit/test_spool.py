"""The metric log never loses a complete line, never holds a step twice; the outbox keeps order until delivery."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.tracking.names import LOSS, METRICS
from orchestrator.tracking.spool import Command, Courier, Outbox, Point, Spool, follow

WRITE_FOREVER = """
import sys
from pathlib import Path
from orchestrator.tracking.spool import Spool
spool = Spool(Path(sys.argv[1]))
for step in range(10**9):
    spool.append("student", step, {"train/loss": 1.0 / (step + 1)}, 1000.0 + step)
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def fill(spool: Spool, stage: str, steps: range) -> None:
    for step in steps:
        spool.append(stage, step, {LOSS: 10.0 - step}, 1000.0 + step)


def test_a_line_has_the_documented_form(log: Path) -> None:
    Spool(log).append("student", 12, {LOSS: 2.5}, 1700000000.5)
    assert json.loads(log.read_text()) == {"stage": "student", "step": 12, "time_s": 1700000000.5, "metrics": {LOSS: 2.5}}
    assert Spool(log).read() == [Point("student", 12, 1700000000.5, {LOSS: 2.5})]


def test_repeated_steps_are_dropped_also_after_a_restart(log: Path) -> None:
    fill(Spool(log), "student", range(10))
    again = Spool(log)
    assert not again.append("student", 9, {LOSS: 99.0}, 5.0)
    assert again.append("student", 10, {LOSS: 0.0}, 5.0)
    assert not again.append("student", 10, {LOSS: 99.0}, 5.0)
    assert again.append("baseline", 3, {LOSS: 7.0}, 5.0), "each stage has its own high-water mark"
    assert [p.step for p in again.read("student")] == list(range(11))
    assert all(p.metrics[LOSS] != 99.0 for p in again.read())


def test_non_finite_values_are_left_out_and_the_rest_stays(log: Path) -> None:
    spool = Spool(log)
    assert spool.append("student", 1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 4.0}, 1.0)
    assert not spool.append("student", 2, {"a": math.nan}, 2.0)
    assert [p.metrics for p in spool.read()] == [{"d": 4.0}]


@pytest.mark.parametrize(
    "torn", [b"{", b'{"stage": "student", "step": 5, "time_s": 1, "metrics": {"a": 1}}', b"\0" * 5000, b"\xff"]
)
def test_a_torn_last_line_is_cut_off(log: Path, torn: bytes) -> None:
    fill(Spool(log), "student", range(5))
    whole = log.read_bytes()
    log.write_bytes(whole + torn)
    assert len(list(follow(log))) == 5, "a reader does not take it for a point"
    spool = Spool(log)
    assert log.read_bytes() == whole
    log.write_bytes(whole + torn)  # another writer of the same log dies while this one is open
    assert spool.append("student", 5, {LOSS: 1.0}, 1.0)
    assert [p.step for p in Spool(log).read()] == list(range(6))


def test_a_damaged_line_costs_only_itself(log: Path) -> None:
    fill(Spool(log), "student", range(5))
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    log.write_bytes(b"".join(lines))
    assert [p.step for p in Spool(log).read()] == [0, 1, 3, 4]


def test_a_killed_writer_leaves_every_step_once(log: Path) -> None:
    for _ in range(3):
        before = len(list(follow(log)))
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(log)])
        while len(list(follow(log))) < before + 50:
            assert writer.poll() is None
            time.sleep(0.005)
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    steps = [p.step for p in Spool(log).read()]
    assert steps == list(range(len(steps)))


def test_threads_share_a_spool(log: Path) -> None:
    spool = Spool(log)
    threads = [threading.Thread(target=fill, args=(spool, f"stage-{i % 2}", range(200))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stage in ("stage-0", "stage-1"):
        steps = [p.step for p in spool.read(stage)]
        assert steps == sorted(set(steps)) and steps[-1] == 199


def test_follow_starts_over_when_the_log_was_replaced(log: Path) -> None:
    fill(Spool(log), "student", range(50))
    *_, (_, end) = follow(log)
    assert list(follow(log, end)) == []
    log.unlink()
    assert list(follow(log, end)) == []
    fill(Spool(log), "student", range(3))
    assert [p.step for p, _ in follow(log, end)] == [0, 1, 2]


def drain(outbox: Outbox) -> list[str]:
    """Deliver everything, as short words."""
    words = []
    while item := outbox.head():
        words += [item.kind] if isinstance(item, Command) else [str(p.step) for p, _ in item]
        outbox.delivered(item)
    return words


def test_the_outbox_keeps_the_order_over_restarts(log: Path) -> None:
    state, spool = log.with_name("tracking.json"), Spool(log)
    outbox = Outbox(state, log)
    outbox.put(("open", "student", {}))
    fill(spool, "student", range(2))
    outbox.put(("finish", "student", {"status": "FINISHED"}))
    fill(spool, "student", range(2, 3))
    outbox.set_run("student", "abc", "1")
    again = Outbox(state, log)
    assert again.runs == {"student": "abc"} and again.key == outbox.key
    assert drain(again) == ["open", "0", "1", "finish", "2"]
    assert drain(Outbox(state, log)) == []
    again.forget_run("student")
    assert again.runs == {} and drain(again) == ["0", "1", "2"]


def test_a_damaged_state_is_begun_anew(log: Path) -> None:
    state = log.with_name("tracking.json")
    first = Outbox(state, log)
    first.put(("open", "student", {}))
    state.write_bytes(state.read_bytes()[:-20])
    assert Outbox(state, log).head() is None and Outbox(state, log).key != first.key


def test_the_courier_tries_again_until_it_works(log: Path) -> None:
    outbox, sent, errors = Outbox(log.with_name("tracking.json"), log), [], []

    def send(item: Command | list[Point]) -> None:
        if not errors:
            raise ConnectionError("first time")
        sent.append(item)

    fill(Spool(log), "student", range(3))
    courier = Courier(outbox, send, errors.append)
    courier.start()
    assert courier.finish(5.0)
    assert [str(e) for e in errors] == ["first time"] and [p.step for p in sent[0]] == [0, 1, 2]


def test_a_hanging_courier_is_left_behind_and_writes_nothing_more(log: Path) -> None:
    state, reply, asked = log.with_name("tracking.json"), threading.Event(), threading.Event()
    outbox = Outbox(state, log)
    outbox.put(("open", "student", {}))

    def hang(item: Command | list[Point]) -> None:
        asked.set()
        reply.wait(10.0)

    courier = Courier(outbox, hang, lambda error: None)
    courier.start()
    assert asked.wait(5.0)
    start = time.monotonic()
    assert not courier.finish(0.1)
    assert time.monotonic() - start < 2.0
    reply.set()
    assert courier.finish(5.0), "the thread ends once it is answered"
    assert drain(Outbox(state, log)) == ["open"], "what was not answered in time is delivered again"


def test_the_metric_table_is_whole_and_frozen() -> None:
    assert all(name == metric.name and metric.unit and metric.help for name, metric in METRICS.items())
    with pytest.raises(TypeError):
        METRICS["x"] = METRICS[LOSS]  # type: ignore[index]
