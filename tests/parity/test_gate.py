"""Ranks go through the gate together, whichever of them is late, asked to save, or told that its labels will not come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.parity.ranks import run_on_ranks

pytestmark = pytest.mark.slice

LATE_S = 1.5


def scenes() -> dict[str, Any]:
    import ray

    from orchestrator.student import gate

    asked: dict[str, Any] = {"reason": None, "saves": 0}
    ray.get = lambda given: given  # the board of this test is no actor
    gate.ASK_EVERY_S = 0.02

    board = SimpleNamespace(wanted=SimpleNamespace(remote=lambda: (asked["reason"], asked["saves"])))
    rank, found = dist.get_rank(), {}

    def walk(steps: Iterator[tuple[int, str]], during: Any = lambda step: None) -> dict[str, Any]:
        asked.update(reason=None, saves=0)
        seen, saved, ended = [], [], ""
        entered = []

        def save() -> int:
            saved.append(len(seen))
            return len(seen)

        try:
            for step, _ in gate.Gate(board).through(steps, save):
                seen.append(step)
                entered.append(time.time())
                during(step)
        except Exception as error:
            ended = str(error)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, {"seen": seen, "saved": saved, "ended": ended, "entered": entered})
        return {name: [one[name] for one in everywhere] for name in everywhere[0]}

    def even() -> Iterator[tuple[int, str]]:
        yield from ((step, "rows") for step in range(4))

    def late() -> Iterator[tuple[int, str]]:
        for step in range(4):
            if step == 2 and rank == 1:
                time.sleep(LATE_S)
            yield step, "rows"

    def never() -> Iterator[tuple[int, str]]:
        from orchestrator.errors import ResumableError

        yield from ((step, "rows") for step in range(2))
        if rank == 1:
            raise ResumableError("training stopped waiting for label shard 7: the teacher failed")
        yield 2, "rows"

    def ask(what: str, value: Any) -> Any:
        def during(step: int) -> None:
            if step == 1 and rank == 0:
                asked[what] = value
            time.sleep(0.3)  # until the first rank has heard of it

        return during

    found["even"] = walk(even())
    found["late"] = walk(late())
    found["never"] = walk(never())
    found["stop"] = walk(even(), ask("reason", "stopped by SIGTERM"))
    found["save"] = walk(even(), ask("saves", 1))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root: Path = tmp_path_factory.mktemp("gate")
    return run_on_ranks(2, root, scenes)


def test_all_ranks_take_every_step(found: dict[str, Any]) -> None:
    for scene in ("even", "late", "save"):
        assert found[scene]["seen"] == [[0, 1, 2, 3]] * 2 and found[scene]["ended"] == ["", ""]
    assert found["even"]["saved"] == [[], []]


def test_nobody_enters_a_step_before_the_last_has_its_rows(found: dict[str, Any]) -> None:
    first, second = found["late"]["entered"]
    assert first[2] - first[1] > 0.9 * LATE_S and abs(first[2] - second[2]) < 0.5 * LATE_S


def test_labels_that_do_not_come_to_one_stop_all_at_the_same_step(found: dict[str, Any]) -> None:
    scene = found["never"]
    assert scene["seen"] == [[0, 1]] * 2 and scene["saved"] == [[2]] * 2
    assert (
        scene["ended"][1]
        == "stopped at step 2, where it goes on: training stopped waiting for label shard 7: the teacher failed"
    )
    assert scene["ended"][0].startswith("stopped at step 2, where it goes on:")


def test_an_abort_is_heard_by_all_and_saved_first(found: dict[str, Any]) -> None:
    scene = found["stop"]
    assert scene["seen"] == [[0, 1]] * 2 and scene["saved"] == [[2]] * 2
    assert scene["ended"][0].endswith("stopped by SIGTERM")


def test_a_checkpoint_that_is_asked_for_is_saved_once(found: dict[str, Any]) -> None:
    assert found["save"]["saved"] == [[2]] * 2
