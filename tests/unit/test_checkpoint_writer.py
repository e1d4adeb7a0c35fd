"""Checkpoints are written beside training: what they hold, when they count, and what becomes of a failure."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.errors import EnvironmentFault, LockedError
from orchestrator.store.files import HeldElsewhere, Part
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MANIFEST
from orchestrator.student import checkpoint, snapshot
from orchestrator.student.checkpoint import CheckpointWriter, Saved, restore_checkpoint, save_checkpoint
from orchestrator.student.snapshot import HostMemory

FOLDER = "student/key"
PATIENCE_S = 20.0


class Engine:
    """What a writer needs of DeepSpeed's engine: it saves its weights in one file, and loads them."""

    def __init__(self) -> None:
        self.weights = torch.arange(4.0)
        self.optimizer = torch.optim.SGD([self.weights.requires_grad_()], lr=1.0)
        self.checkpoint_engine: Any = SimpleNamespace(load=lambda path, map_location: torch.load(path))
        self._copy_recovery_script = lambda folder: pytest.fail("a program was left among the data")

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, client_state: dict[str, Any]) -> None:
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save({"weights": self.weights, **client_state}, f"{folder}/{tag}/weights.pt")
        self._copy_recovery_script(folder)

    def step(self) -> None:
        """Take one from every weight."""
        self.weights.grad = torch.ones(4)
        self.optimizer.step()

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        state = self.checkpoint_engine.load(f"{folder}/{tag}/weights.pt", map_location="cpu")
        self.weights.data.copy_(state.pop("weights"))
        return folder, state


class Slow(LocalStore):
    """Keeps the parts of folders waiting until it is told to go on."""

    go_on = threading.Event()

    @contextmanager
    def part_of(self, key: str) -> Iterator[Part]:
        with super().part_of(key) as part:
            yield part
            assert self.go_on.wait(PATIENCE_S)


@pytest.fixture
def schedule() -> Any:
    return SimpleNamespace(state=lambda: [0.5], restore=lambda state: None)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one rank."""
    monkeypatch.setattr(checkpoint, "_allow_deepspeed_types", lambda: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wait_until_settled(writer: CheckpointWriter) -> Saved:
    end = time.monotonic() + PATIENCE_S
    while (settled := writer.settled()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return settled


def restored(store: LocalStore, schedule: Any) -> tuple[int, list[float]]:
    engine = Engine()
    return restore_checkpoint(engine, schedule, store, FOLDER), engine.weights.tolist()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, schedule: Any) -> None:
    store, engine, before = Slow(tmp_path), Engine(), time.time()
    writer = CheckpointWriter(engine, schedule, store, FOLDER)
    writer.start(7)
    engine.step()
    assert writer.settled() is None and store.keys(f"{FOLDER}/checkpoints") == [], "nothing counts before its manifest"
    store.go_on.set()
    saved = wait_until_settled(writer)
    assert before <= saved.at_s <= time.time() and saved.stalled_s < PATIENCE_S / 2
    assert writer.settled() is None, "it is told of once"
    assert restored(store, schedule) == (7, [0.0, 1.0, 2.0, 3.0]), "as it was when the checkpoint was begun"
    assert store.path(f"{FOLDER}/checkpoints/step-000007/{MANIFEST}").is_file()
    assert sorted(path.name for path in store.path(f"{FOLDER}/checkpoints").iterdir()) == ["step-000007"]


def test_an_update_waits_for_the_copy_and_nothing_else_does(
    store: LocalStore, schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, go_on, updated, fill = Engine(), threading.Event(), threading.Event(), HostMemory.fill

    def slowly(memory: HostMemory) -> None:
        assert go_on.wait(PATIENCE_S)
        fill(memory)

    monkeypatch.setattr(HostMemory, "fill", slowly)
    writer = CheckpointWriter(engine, schedule, store, FOLDER)
    writer.start(1)  # returns before anything is copied
    update = threading.Thread(target=lambda: (engine.step(), updated.set()))
    update.start()
    assert not updated.wait(0.3) and engine.weights.tolist() == [0.0, 1.0, 2.0, 3.0]
    go_on.set()
    assert updated.wait(PATIENCE_S) and engine.weights.tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert 0.3 <= wait_until_settled(writer).stalled_s < PATIENCE_S / 2
    assert restored(store, schedule) == (1, [0.0, 1.0, 2.0, 3.0])
    assert not engine.optimizer._optimizer_step_pre_hooks, "later steps ask nobody"


def test_one_is_written_at_a_time_and_two_are_kept(store: LocalStore, schedule: Any) -> None:
    engine = Engine()
    writer = CheckpointWriter(engine, schedule, store, FOLDER)
    for step in (1, 2, 3):
        engine.step()
        writer.start(step)
    writer.finish()
    assert store.keys(f"{FOLDER}/checkpoints") == ["step-000002", "step-000003"]
    assert restored(store, schedule) == (3, [-3.0, -2.0, -1.0, 0.0])


def test_save_now_returns_when_it_is_durable(store: LocalStore, schedule: Any) -> None:
    save_checkpoint(Engine(), schedule, store, FOLDER, 5)
    assert restored(store, schedule)[0] == 5


@pytest.mark.parametrize("asked", ["settled", "finish", "start"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:603] .")]
)
def test_a_failed_write_surfaces_in_a_later_step(
    store: LocalStore, schedule: Any, monkeypatch: pytest.MonkeyPatch, asked: str, error: Exception
) -> None:
    engine, failed = Engine(), threading.Event()
    writer = CheckpointWriter(engine, schedule, store, FOLDER)
    writer.start(1)
    wait_until_settled(writer)

    def fail(*_: object) -> None:
        failed.set()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(snapshot.torch, "save", fail)
        writer.start(2)
        assert failed.wait(PATIENCE_S), "the fault has not fired"
        with pytest.raises(EnvironmentFault, match="disk full"):
            {"settled": lambda: wait_until_settled(writer), "finish": writer.finish, "start": lambda: writer.start(3)}[asked]()
    assert store.keys(f"{FOLDER}/checkpoints") == ["step-000001"]
    assert restored(store, schedule)[0] == 1


def test_a_training_that_is_another_runs_now_publishes_nothing(store: LocalStore, schedule: Any) -> None:
    key = f"{FOLDER}/lock"
    with store.exclusive(key) as lock:
        writer = CheckpointWriter(Engine(), schedule, store, FOLDER, still_ours=HeldElsewhere(store, key, lock.token))
        writer.start(1)
        writer.finish()
    with store.exclusive(key), pytest.raises(LockedError, match=f"is locked by .*:{os.getpid()} since"):
        writer.save_now(2)
    assert store.keys(f"{FOLDER}/checkpoints") == ["step-000001"]


def test_a_file_that_the_manifest_does_not_name_is_not_loaded(store: LocalStore, schedule: Any) -> None:
    save_checkpoint(Engine(), schedule, store, FOLDER, 1)
    manifest = store.path(f"{FOLDER}/checkpoints/step-000001/{MANIFEST}")
    manifest.write_text(manifest.read_text().replace("engine/weights.pt", "engine/others.pt"))
    (manifest.parent / "engine/weights.pt").rename(manifest.parent / "engine/others.pt")
    torch.save({"weights": torch.zeros(4), "objective": []}, manifest.parent / "engine/weights.pt")
    with pytest.raises(Exception, match=r"weights\.pt is no file of"):
        restored(store, schedule)


def test_copies_are_apart_share_what_is_shared_and_use_their_memory_again(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory, weight = HostMemory(), torch.randn(3, 4, generator=generator)
    state = {"a": weight, "tied": weight, "view": weight[1], "list": [weight.t(), 5, None], "sizes": (weight.shape,)}

    def copied() -> Any:
        memory.begin()
        found = memory.plan(state)
        memory.fill()
        return found

    first = copied()
    assert (
        torch.equal(first["a"], weight) and torch.equal(first["view"], weight[1]) and torch.equal(first["list"][0], weight.t())
    )
    assert first["a"] is first["tied"] and first["list"][1:] == [5, None] and first["sizes"] == (weight.shape,)
    before = weight.clone()
    weight.add_(1.0)
    assert torch.equal(first["a"], before)
    place = first["a"].data_ptr()
    again = copied()
    assert torch.equal(again["a"], weight) and again["a"].data_ptr() == place
    state["a"] = torch.zeros(5, 5)
    assert torch.equal(copied()["a"], torch.zeros(5, 5)), "another structure finds other room"
