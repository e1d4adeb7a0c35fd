"""The process that measures models, on a Ray of one slot: it waits for room aloud, and a killed one is replaced."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from orchestrator.errors import DataError, find_user_error
from orchestrator.evaluate import measure as measuring
from orchestrator.evaluate.measure import Bench, measure
from orchestrator.evaluate.model import AnsweringTeacher, Subject
from orchestrator.evaluate.windows import Heldout
from orchestrator.store.local import LocalStore
from orchestrator.teacher.backend import Replica, TransformersBackend
from tests.answers import Here, answer, heldout_of, saved
from tests.conftest import TokenizedCorpus
from tests.tiny import alive, command_line, eventually
from tests.unit.test_tokens import VOCAB, tiny

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

TAKES = {"CPU": 1.0, "GPU": 0.0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from orchestrator.runtime.environment import prepare_ray

    prepare_ray(local=True)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@ray.remote(num_cpus=1)
class Busy:
    """Something that has the only slot."""


@pytest.fixture
def asked(
    seed: int, store: LocalStore, tokenized: TokenizedCorpus, tmp_path: Path
) -> tuple[Heldout, AnsweringTeacher, Subject]:
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    heldout = heldout_of(store, ids, None, tokenized.store.path(f"{tokenized.folder}/tokenizer"))
    folders = [saved(tiny(seed + i, width), tmp_path / str(i)) for i, width in enumerate((32, 16))]
    replica = Replica(str(folders[0]), "fp32")
    answer(heldout, TransformersBackend(replica), VOCAB, replica)
    return heldout, AnsweringTeacher(str(folders[0]), "fp32", VOCAB), Subject(str(folders[1]), "fp32")


def processes() -> list[psutil.Process]:
    """Those that measure."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::_Measurer" in command_line(p) and alive(p)]


def steady(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "tokens_per_s"}


def test_it_waits_for_room_and_measures_as_here(cluster: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout, teacher, subject = asked
    busy: Any = Busy.remote()
    ray.get(busy.__ray_ready__.remote())
    monkeypatch.setattr(measuring, "SAY_EVERY_S", 1.0)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        ray.kill(busy)

    bench, warnings = Bench(TAKES, 4, say), list[str]()
    found = measure(heldout, teacher, {"student": subject}, bench, warnings.append)
    assert said[0] == "evaluate: waiting for a process with 1 CPU, 1 s so far" and not warnings
    here: Any = Here(4)
    due = measure(heldout, teacher, {"student": subject}, here, warnings.append)
    assert {name: steady(found.figures[name]) for name in due.figures} == {n: steady(f) for n, f in due.figures.items()}
    assert found.samples == due.samples and found.generated == due.generated
    eventually(lambda: not processes(), "its process is gone")


def test_a_killed_process_is_replaced_and_a_failed_one_left(cluster: Any, asked: Any, tmp_path: Path) -> None:
    heldout, teacher, subject = asked
    bench = Bench(TAKES, 4, print)
    before = bench.teacher(heldout, teacher)
    (victim,) = processes()
    victim.kill()
    assert steady(bench.teacher(heldout, teacher).figures) == steady(before.figures)
    (again,) = processes()
    assert again != victim
    broken = tiny(0, 16)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(Exception, match="not finite") as caught:
        bench.model("baseline", Subject(str(saved(broken, tmp_path / "broken")), "fp32"), heldout, teacher)
    assert isinstance(find_user_error(caught.value), DataError)
    assert bench.model("student", subject, heldout, teacher).figures["kl_to_teacher_nats"] > 0
    assert processes() != [again], "after a failure it is another process"
    bench.end()
    eventually(lambda: not processes(), "its process is gone")
