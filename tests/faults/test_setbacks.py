"""A teacher replica that fails: once, and the labelling goes on; again and again, and it ends with the cause."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.errors import DistillError, ResumableError, find_user_error
from orchestrator.models.build import build_model
from orchestrator.runtime.board import Board, start_board
from orchestrator.spec.labels import SampledLabels
from orchestrator.spec.model import Model, Replicas, TeacherBase
from orchestrator.store.claims import Claims
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MANIFEST
from orchestrator.teacher.backend import Replica
from orchestrator.teacher.labeller import SETBACKS
from orchestrator.teacher.placement import Placement
from orchestrator.teacher.pool import label_shards
from orchestrator.teacher.task import LabelTask
from tests.conftest import TokenizedCorpus

pytestmark = [pytest.mark.faults, pytest.mark.slice]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker that is started anew does not find this module

SHARDS = 4
ECC = "CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
LOADING, SECOND_SHARD = f"data/corpus/{MANIFEST}", "train/000001-"


class FaultyStore(LocalStore):
    """A storage in which reading keys with `where` in them does `how` to the process that reads, the first `times` times."""

    def __init__(self, root: Path, where: str, how: Exception | signal.Signals, times: int) -> None:
        super().__init__(root)
        self._where, self._how, self._times = where, how, times

    @property
    def struck(self) -> list[int]:
        """The processes to which that has happened."""
        file = self.root / "struck"
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def read(self, key: str) -> bytes:
        if self._where in key and len(self.struck) < self._times:
            with (self.root / "struck").open("a") as file:
                file.write(f"{os.getpid()}\n")
            if isinstance(self._how, signal.Signals):
                os.kill(os.getpid(), self._how)
            else:
                raise self._how
        return super().read(key)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from orchestrator.runtime.environment import prepare_ray

    prepare_ray(local=True)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture
def root(tokenized: TokenizedCorpus, seed: int, tmp_path: Path) -> Path:
    """A storage with tokens and a teacher."""
    shutil.copytree(tokenized.store.root, tmp_path / "store")
    build_model(Model(config=SMALL), tokenized.manifest.vocab_size, seed, "teacher").save_pretrained(
        tmp_path / "store" / "teacher"
    )
    return tmp_path / "store"


def label(store: FaultyStore, tokenized: TokenizedCorpus, board: Any) -> list[dict[str, Any]]:
    """Label a few shards; the receipts."""
    log = LabelLog.open(store, {"test": 1})
    task = LabelTask(
        store=store,
        data_folder=tokenized.folder,
        replica=Replica(str(store.root / "teacher"), "fp32"),
        vocab_size=tokenized.manifest.vocab_size,
        labels=SampledLabels(samples=5, run_ahead=None),
        log_key=log.key,
        micro_batch=8,
        board=board,
        claims=Claims(store, log.folder, "one"),
    )
    room = Placement(log.key, TeacherBase(), print)
    receipts = list(label_shards(task, [(shard, shard) for shard in range(SHARDS)], Replicas(), room))
    assert log.missing(range(SHARDS)) == [] == store.keys(f"{log.folder}/claims")
    return receipts


def how_it_ends(store: FaultyStore, tokenized: TokenizedCorpus, board: Any) -> BaseException:
    with pytest.raises(Exception) as ended:
        label(store, tokenized, board)
    return find_user_error(ended.value) or ended.value


@pytest.mark.usefixtures("cluster")
def test_an_accelerator_that_fails_once_costs_one_process(root: Path, tokenized: TokenizedCorpus) -> None:
    store, board = FaultyStore(root, SECOND_SHARD, RuntimeError(ECC), times=1), start_board()
    receipts = label(store, tokenized, board)
    assert len(receipts) == SHARDS and [receipt["outcome"] for receipt in receipts][1:] == ["labelled"] * (SHARDS - 1)
    assert len(store.struck) == 1 and receipts[-1]["process"] not in store.struck
    (warning,) = ray.get(board.take_warnings.remote())
    assert "teacher replica is started anew: RuntimeError: CUDA error: uncorrectable ECC error" in warning


@pytest.mark.usefixtures("cluster")
def test_an_accelerator_that_fails_always_ends_the_labelling(root: Path, tokenized: TokenizedCorpus) -> None:
    store = FaultyStore(root, LOADING, RuntimeError(ECC), times=100)
    error = how_it_ends(store, tokenized, start_board())
    assert isinstance(error, ResumableError) and len(set(store.struck)) == SETBACKS == len(store.struck)
    said = f"teacher: a replica failed {SETBACKS} times without labelling a shard in between: RuntimeError: CUDA error: uncorr"
    assert str(error).startswith(said)


@pytest.mark.usefixtures("cluster")
def test_a_process_that_dies_at_every_start_ends_the_labelling(root: Path, tokenized: TokenizedCorpus) -> None:
    store = FaultyStore(root, LOADING, signal.SIGKILL, times=100)
    error = how_it_ends(store, tokenized, start_board())
    assert isinstance(error, ResumableError) and len(set(store.struck)) == SETBACKS == len(store.struck)
    assert "without telling a cause" in str(error)


@pytest.mark.usefixtures("cluster")
def test_what_would_only_be_repeated_is_not_tried_again(root: Path, tokenized: TokenizedCorpus) -> None:
    store = FaultyStore(root, LOADING, RuntimeError("Error(s) in loading state_dict"), times=100)
    error = how_it_ends(store, tokenized, start_board())
    assert not isinstance(error, DistillError) and "Error(s) in loading state_dict" in str(error) and len(store.struck) == 1


def test_a_labelled_shard_renews_the_budget() -> None:
    board = Board()
    assert board.replica_starts("a") == (0, "") == board.replica_starts("b")
    assert [board.replica_starts("a")[0] for _ in range(2)] == [1, 2]
    board.replica_failed("a", "a cause")
    assert board.replica_starts("a") == (3, "a cause") and board.replica_starts("b") == (1, "")
    board.replica_labelled("a")
    assert board.replica_starts("a") == (1, "")
