"""Where an export may go: a run writes over its own, and over nobody else's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.export.folder import ORIGIN, check_target
from orchestrator.store.files import Store, open_store

OURS, OTHERS = {"run": "notes-2", "identity": "22"}, {"run": "notes", "identity": "11"}


@pytest.fixture(params=["directory", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "out") if request.param == "directory" else request.getfixturevalue("s3")


def exported(target: Store, origin: dict[str, str] | None) -> None:
    with target.folder_for("") as folder:
        (folder / "config.json").write_text("{}")
        if origin is not None:
            (folder / ORIGIN).write_text(json.dumps(origin))


def test_nothing_and_its_own_export_are_in_no_runs_way(target: Store) -> None:
    check_target(target.address(), OURS)
    exported(target, OURS)
    check_target(target.address(), OURS)


@pytest.mark.parametrize(
    ("origin", "what"),
    [(OTHERS, "the export of run notes,"), (OURS | {"identity": "33"}, "the export of run notes-2,"), (None, "a model that")],
    ids=["another run", "a run of that name in another storage", "a model of somebody's"],
)
def test_what_another_made_is_left_alone(target: Store, origin: dict[str, str] | None, what: str) -> None:
    exported(target, origin)
    with pytest.raises(SpecError, match=f"^export.directory: .* holds {what}.*-notes-2, or to null") as caught:
        check_target(target.address(), OURS)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
    check_target(f"{target.address()}-notes-2", OURS)


def test_what_is_no_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(EnvironmentFault, match="not a model folder"):
        check_target(str(tmp_path), OURS)
