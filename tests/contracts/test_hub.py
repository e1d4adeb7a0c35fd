"""A teacher that the job file calls by its name on a hub: imported from one node's cache, opened by all from the storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from orchestrator.errors import EnvironmentFault
from orchestrator.spec.model import TransformersTeacher
from orchestrator.store.files import Store, local_folder
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ModelFolder
from orchestrator.teacher.fetch import fetch_teacher
from tests.field.cases import save_model

NAME, COMMIT = "maker/model", "c" * 40


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store") if request.param == "directory" else request.getfixturevalue("s3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("hub") / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of this node, still empty; no hub can be reached."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def download(model: Path, cache: Path) -> None:
    """Lay `model` into the cache as the hub's own program does: blobs, and a snapshot of links to them."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    shutil.rmtree(repository, ignore_errors=True)
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))


def fetch(store: Store) -> ModelFolder:
    return fetch_teacher(store, TransformersTeacher(kind="transformers", path=NAME))


def test_every_node_opens_it_in_the_storage(store: Store, model: Path, cache: Path) -> None:
    download(model, cache)
    teacher = fetch(store)
    assert teacher.address.startswith(f"{store.address()}/teacher/"), "what actors are given lies in the storage"
    shutil.rmtree(cache)  # another node has none
    folder = local_folder(teacher.address)
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "generation_config.json"}
    assert names <= {file.name for file in folder.iterdir()} and not any(file.is_symlink() for file in folder.iterdir())
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in names)
    assert fetch(store) == teacher, "no hub and no cache are needed any more"


def test_its_identity_is_that_of_the_same_model_in_a_local_folder(store: Store, model: Path, cache: Path) -> None:
    download(model, cache)
    local = fetch_teacher(store, TransformersTeacher(kind="transformers", path=str(model)))
    assert local.address == str(model)
    assert fetch(store).manifest.content == local.manifest.content


def test_it_is_imported_once_and_again_when_it_changes_or_is_damaged(
    store: Store, model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b, **asked: copied.append(a.name) or copy(a, b, **asked))
    download(model, cache)
    copied.clear()
    first = fetch(store)
    once = len(copied)
    assert once >= 5 and fetch(store) == first and len(copied) == once
    if isinstance(store, LocalStore):  # S3 checks what a node downloads, and what lies there by its ETag
        (local_folder(first.address) / "config.json").write_text("{}")
        assert fetch(store) == first and len(copied) == 2 * once
        assert (local_folder(first.address) / "config.json").read_bytes() == (model / "config.json").read_bytes()
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    download(other, cache)
    changed = fetch(store)
    assert changed.address != first.address and changed.manifest.content != first.manifest.content


def test_a_name_that_nobody_has_fetched_is_refused(store: Store, cache: Path) -> None:
    with pytest.raises(EnvironmentFault, match=rf"^teacher\.path: {NAME} is no local directory and cannot be fetched"):
        fetch(store)
