"""How often a training is started again: progress renews the budget, the last cause is shown, bugs are not repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError

from orchestrator.errors import DataError, EnvironmentFault, ResumableError
from orchestrator.store.files import unguarded
from orchestrator.store.local import LocalStore
from orchestrator.student import launch
from orchestrator.student.launch import Host, _until_done
from tests.unit.test_result_fields import training

ECC = RuntimeError("CUDA error: uncorrectable ECC error encountered")


class Attempts:
    """Stands in for worker groups: each attempt saves a checkpoint at a step, or none, and fails or ends well."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.said = LocalStore(tmp_path), list[str]()
        self.plan: list[tuple[int | None, Exception | None]] = []
        self.aborted: str | None = None
        self.begun = 0
        monkeypatch.setattr(launch, "_fit", self.fit)
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})

    def fit(self, job: Any, config: Any) -> None:
        step, error = self.plan[self.begun]
        self.begun += 1
        if step is not None:
            with self.store.folder_for(f"{job.folder}/checkpoints/step-{step:06d}") as folder:
                (folder / "file").write_text("")
        if error is not None:
            raise error

    def run(self, *plan: tuple[int | None, Exception | None], awaits_room: Callable[[], bool] = lambda: False) -> None:
        from orchestrator.spec.train import Train

        self.plan, self.begun = list(plan), 0
        board = SimpleNamespace(post=SimpleNamespace(remote=lambda *_: None))
        host = Host(self.store, board, "tokenizer", self.said.append, self.said.append)
        _until_done(host, training(Train(max_restarts=2)), unguarded, awaits_room, lambda: self.aborted)


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(tmp_path, monkeypatch)


def failed(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("a group failed", dict(enumerate(errors)))


def test_an_accelerator_fault_is_got_over(attempts: Attempts) -> None:
    attempts.run((None, failed(ECC)), (None, None))
    assert attempts.said == [
        "student: a fault of an accelerator: CUDA error: uncorrectable ECC error encountered; retry 1/2 from step 0"
    ]


def test_the_last_cause_is_shown_when_the_budget_is_used_up(attempts: Attempts) -> None:
    with pytest.raises(ResumableError, match=r"failed 3 times without getting past step 40; .*illegal memory access") as caught:
        attempts.run(
            (40, failed(ECC)),
            (None, failed(ECC)),
            (None, failed(RuntimeError("CUDA error: an illegal memory access was encountered"))),
        )
    assert attempts.begun == 3 and caught.value.exit_code == 6


def test_every_new_checkpoint_renews_the_budget(attempts: Attempts) -> None:
    attempts.run(*((20 * n, failed(ECC)) for n in range(1, 8)), (None, None))
    assert attempts.begun == 8 and attempts.said[-1].endswith("retry 1/2 from step 140")


def test_a_bug_and_a_users_error_are_raised_at_once(attempts: Attempts) -> None:
    bug, users = ValueError("not enough values to unpack"), DataError("token shard 3: damaged")
    for error in (bug, users):
        with pytest.raises(type(error)) as caught:
            attempts.run((None, failed(error)), (None, None))
        assert caught.value is error and attempts.begun == 1


def test_no_attempt_follows_an_abort(attempts: Attempts) -> None:
    attempts.aborted = "the teacher failed"
    with pytest.raises(ResumableError, match=r"the run is ending \(the teacher failed\)"):
        attempts.run((None, failed(ECC)), (None, None))
    assert attempts.begun == 1


def test_room_is_waited_for_as_long_as_it_is_said(attempts: Attempts) -> None:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    no_room, waits = ControllerError(WorkerGroupStartupTimeoutError(2)), iter([True, True, False])
    attempts.run((None, no_room), (None, no_room), (None, None), awaits_room=lambda: next(waits))
    assert attempts.begun == 3 and attempts.said == []
    with pytest.raises(EnvironmentFault, match="no room for 1 workers"):
        attempts.run((None, no_room))
