"""A second student of the same teacher on the same data: no teacher is started for it, not even to measure it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import (
    LABELLER,
    TRAINER,
    Json,
    Reference,
    distill,
    model,
    report,
    statuses,
    write_job,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

NO_TEACHER = """
import sys
from importlib.abc import MetaPathFinder

TEACHER = {"orchestrator.teacher." + name for name in ("backend", "gang", "labeller", "make", "pool", "vllm")}

class NoTeacher(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in TEACHER:
            raise RuntimeError("a teacher was started")

sys.meta_path.insert(0, NoTeacher())
"""
"""A `sitecustomize` that makes every process fail, the driver and all of Ray's, which loads what a teacher runs on."""
SPEEDS = {"tokens_per_s"}


@pytest.fixture
def no_teacher(tmp_path: Path) -> dict[str, str]:
    """An environment in which no teacher can be started."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(NO_TEACHER)
    paths = [str(tmp_path / "hooks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def figures(found: Json) -> Json:
    """What was measured, without speeds."""
    models = ({k: v for k, v in found[name].items() if k not in SPEEDS} for name in ("teacher", "student"))
    return {"models": [*models], "heldout": found["heldout"], "generated": found["generated"]}


def test_a_second_student_starts_no_teacher(reference: Reference, no_teacher: dict[str, str], tmp_path: Path) -> None:
    """Another objective and another size; its figures are those of a run from a storage without labels."""
    loading = [sys.executable, "-c", "import orchestrator.teacher.pool"]
    refused = subprocess.run(loading, env=os.environ | no_teacher, capture_output=True, text=True, check=False)
    assert refused.returncode and "a teacher was started" in refused.stderr, "the hook is heard"

    other: Json = {"student": {"kind": "config", "model": model(2)}, "objective": {"alpha": 0.6}, "name": "second"}
    other["train"] = reference.job["train"] | {"steps": 60}
    again = reference.copy(tmp_path / "again", "labels") | other
    ended = distill(tmp_path / "log-again", "run", write_job(again), env=no_teacher).assert_ok()
    assert statuses(Path(again["storage"]), "second")["labels"] == "reused"
    assert not ended.started(LABELLER) and ended.started(TRAINER)

    alone = reference.copy(tmp_path / "alone") | other
    assert distill(tmp_path / "log-alone", "run", write_job(alone)).assert_ok().started(LABELLER)
    found, due = (report(Path(job["storage"]), "second") for job in (again, alone))
    assert found["faults"] == due["faults"] == []
    assert figures(found) == figures(due)
    assert found["student"]["kl_to_teacher_nats"] > 0 and {"teacher", "student"} < found["generated"][0].keys()
    before = report(reference.storage)
    assert figures(found)["models"][0] == figures(before)["models"][0] and found["teacher"] == before["teacher"]
    assert found["student"]["params"] > before["student"]["params"]
    assert found["student"]["kl_to_teacher_nats"] != before["student"]["kl_to_teacher_nats"], "it is another student"
