"""A gang on a Ray of two slots: it waits for room aloud, survives a shard that stands still, and leaves nothing behind."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.train import ControllerError
from ray.util.placement_group import placement_group_table

from orchestrator.errors import EnvironmentFault
from orchestrator.models.build import build_model
from orchestrator.runtime.board import STUDENT_SHARDS, start_board
from orchestrator.spec.model import Model, TeacherBase
from orchestrator.spec.train import Train
from orchestrator.student import launch
from orchestrator.teacher import gang, placement
from orchestrator.teacher.backend import Replica
from orchestrator.teacher.make import load_replica
from orchestrator.teacher.pace import ASK_EVERY_S, Pace
from orchestrator.teacher.placement import Placement
from orchestrator.teacher.usage import Seconds, Usage
from tests.tiny import alive, command_line, eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

VOCAB, CPUS, PATIENCE_S = 67, 2, 3.0
LEADER, SHARD = "ray::Leader", "ray::TeacherShard"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from orchestrator.runtime.environment import prepare_ray

    prepare_ray(local=True)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Leader:
    """What the pool's actor is to Ray, without the pool."""

    def __init__(self, replica: Replica) -> None:
        self._teacher = load_replica(replica)

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits.log_softmax(-1) for logits in self._teacher.answer(ids).logits()]).clone()


def groups() -> list[str]:
    """States of the placement groups that hold room or want it."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def process(title: str) -> psutil.Process:
    """The one living process of ours with `title`."""
    (found,) = (p for p in psutil.Process().children(recursive=True) if title in command_line(p) and alive(p))
    return found


def test_a_shard_that_stands_still_is_replaced_with_its_gang(seed: int, cluster: Any, tmp_path: Path) -> None:
    build_model(Model(config=SMALL), VOCAB, seed, "teacher").save_pretrained(tmp_path / "model")
    replica = Replica(str(tmp_path / "model"), "fp32", shards=2, patience_s=PATIENCE_S)
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))
    with Placement("key", TeacherBase(shards=2), print) as room:
        room.reserve(1)
        leader = Leader.options(**room.options()).remote(replica)
        said = ray.get(leader.log_probs.remote(ids))
        for title in (SHARD, LEADER):
            gang = [process(LEADER), process(SHARD)]
            victim = gang[title == SHARD]
            victim.suspend()
            eventually(lambda p=victim: p.status() == psutil.STATUS_STOPPED, "it stands still")
            assert torch.equal(ray.get(leader.log_probs.remote(ids)), said), "said again by a new gang"
            assert not any(map(alive, gang)), "all of the old gang is gone"
        ray.kill(leader)
        eventually(
            lambda: not any(SHARD in command_line(p) for p in psutil.Process().children(recursive=True)), "shards end too"
        )
        assert groups() == ["CREATED"]
    eventually(lambda: not groups(), "no room is held any more")


@ray.remote
class Plain:
    """A replica that Ray Data starts and gives up."""


def test_room_is_held_once_however_often_it_is_asked_for(cluster: Any) -> None:
    with Placement("key", TeacherBase(shards=1), print) as room:
        room.reserve(1)
        asked = room.options()
        assert room.options()["name"] == asked["name"] and room.replicas() == 1, "no actor is there yet"
        actor: Any = Plain.options(**asked).remote()
        other = room.options()
        assert other["name"] != asked["name"], "the first room is taken"
        ray.get(actor.__ray_ready__.remote())
        ray.kill(actor)
        eventually(lambda: room.options()["name"] == asked["name"], "it is not taken any more")
        assert len(groups()) == 2
    eventually(lambda: not groups(), "no room is held any more")


def test_no_room_is_said_aloud_and_ends(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    with Placement("other", TeacherBase(shards=1), heard.append) as other:
        other.reserve(1)
        assert heard == [], "there was room"
        monkeypatch.setattr(placement, "SAY_EVERY_S", 1.0)
        asked = TeacherBase(shards=2, placement_timeout_s=4)
        words = r"teacher\.shards: no room for 1 of 1 .* on one node in .* need 2 CPU; .* has 2 CPU; free are 1"
        with pytest.raises(EnvironmentFault, match=words) as no, Placement("key", asked, heard.append) as room:
            room.reserve(1)
        assert no.value.exit_code == 4
    assert any("waiting for room for 1 of 1" in line for line in heard)
    assert any(" ".join(line.split()) == "need 2 CPU have 2 CPU free 1 CPU" for line in heard)
    eventually(lambda: not groups(), "no room is held any more")
    with Placement("key", TeacherBase(shards=2), heard.append) as room:
        room.reserve(1)
        assert room.replicas() == 1


def test_a_training_without_room_ends(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    monkeypatch.setattr(launch, "START_S", 2.0)
    job: Any = SimpleNamespace(stage="student", key="0" * 64, train=Train(workers=2, placement_timeout_s=4))
    with Placement("other", TeacherBase(shards=1), print) as other:
        other.reserve(1)
        with pytest.raises(ControllerError) as failed:
            launch._fit(job, {})
        fault = launch._no_room(failed.value, job)
    assert fault is not None and fault.exit_code == 4
    assert str(fault) == "student: no room for 2 workers of 1 CPU and 0 GPU each in 4 s; free are 1 CPU, 0 GPU"
    assert launch._no_room(RuntimeError("no room"), job) is None


def test_no_shard_is_handed_out_too_far_ahead(cluster: Any) -> None:
    board = start_board()
    pace = Pace([0, 1, 2, 5], 2, board)
    began = time.time()
    assert [pace.allows(handed_out) for handed_out in range(3)] == [True, True, False]
    time.sleep(2 * ASK_EVERY_S)
    assert not pace.allows(2)
    ray.get(board.set_progress.remote(f"student.{STUDENT_SHARDS}", 1))
    time.sleep(1.5 * ASK_EVERY_S)
    assert pace.allows(2)
    assert 3 * ASK_EVERY_S < pace.held_s(began, time.time()) < time.time() - began
    assert pace.held_s(began - 9, began) == 0 == pace.held_s(time.time(), time.time() + 9)
    assert not pace.allows(3) and pace.allows(4), "the last is too far ahead; after it there is nothing to hold back"
    free = Pace([7], None, board)
    assert free.allows(0) and free.held_s(began, time.time()) == 0


def test_the_time_of_replicas_is_added_up() -> None:
    usage, receipt = Usage(), {"seconds": 3.0, "idle_s": 1.0, "blocked_s": 1.0}
    told = [usage.add(receipt | {"replica": r, "process": p}) for r, p in (("a", 1), ("b", 1), ("a", 1), ("a", 2), ("a", 2))]
    assert told == [False, False, False, True, False], "the fourth is of a process that took the place of another"
    assert usage.replicas["a"] == Seconds(12, 4, 4) and usage.total == Seconds(15, 5, 5)
    assert usage.blocked_fraction == 0.25


def test_a_process_whose_call_hangs_is_lost_and_one_that_works_is_not() -> None:
    """Both keep in touch all the time; only the time that a call takes tells them apart."""
    told: dict[str, threading.Event] = {}
    calls = {name: gang._Calls(longest_s=2.5) for name in ("hangs", "works")}
    for name, own in calls.items():
        told[name], (here, there) = threading.Event(), socket.socketpair()
        gang._watch(here, PATIENCE_S, own, lambda silent, name=name: silent or told[name].set())
        gang._watch(there, PATIENCE_S, gang._Calls(longest_s=600), lambda silent: None)
    with calls["hangs"].one():
        for _ in range(5):
            with calls["works"].one():
                time.sleep(1)
        assert told["hangs"].is_set() and not told["works"].is_set()
