"""Records and finished folders: a stage counts as done only while its result is what its record says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EnvironmentFault, IntegrityError, SpecError
from orchestrator.store.files import open_store
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ModelFolder, ModelManifest, finish_model, finished_model
from orchestrator.store.shards import read_tokens

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)), "tokenizer.json": b"{}", "extra/note.txt": b"x"}
STAGE = "student/0123456789abcdef"


@pytest.fixture
def finished(store: LocalStore) -> ModelFolder:
    with store.folder_for(f"{STAGE}/model") as folder:
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        assert not store.exists(f"{STAGE}/model"), "nothing is there before it is whole"
    assert finished_model(store, STAGE) is None, "a folder without its record did not happen"
    return finish_model(store, STAGE, vocab_size=7, training={"steps": 3.0})


def test_a_finished_model_is_found_again(store: LocalStore, finished: ModelFolder) -> None:
    assert finished_model(store, STAGE) == finished
    assert finished.manifest.fingerprint == "0123456789abcdef"
    assert set(finished.manifest.files) == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["first byte", "last byte", "shorter", "longer", "gone", "renamed"])
def test_a_changed_model_is_not_finished(store: LocalStore, finished: ModelFolder, name: str, damage: str) -> None:
    file, content = finished.path / name, FILES[name]
    if damage == "gone":
        file.unlink()
    elif damage == "renamed":
        file.rename(file.with_suffix(".bak"))
    else:
        changed = {
            "first byte": bytes([content[0] ^ 1]) + content[1:],
            "last byte": content[:-1] + bytes([content[-1] ^ 128]),
            "shorter": content[:-1],
            "longer": content + b"\0",
        }
        file.write_bytes(changed[damage])
    assert finished_model(store, STAGE) is None


def test_an_added_file_is_a_change(store: LocalStore, finished: ModelFolder) -> None:
    (finished.path / "pytorch_model.bin").write_bytes(b"")
    assert finished_model(store, STAGE) is None


def test_a_damaged_record_is_an_integrity_error(store: LocalStore, finished: ModelFolder) -> None:
    store.path(f"{STAGE}/manifest.json").write_bytes(b'{"fingerprint": "0')
    with pytest.raises(IntegrityError, match=r"manifest\.json: not a valid record"):
        finished_model(store, STAGE)


def test_identities_follow_the_content(finished: ModelFolder) -> None:
    manifest = finished.manifest

    def with_changed(name: str) -> ModelManifest:
        record = manifest.files[name].model_copy(update={"sha256": "0" * 64})
        return manifest.model_copy(update={"files": manifest.files | {name: record}})

    assert {name for name in FILES if with_changed(name).content == manifest.content} == set()
    assert manifest.model_copy(update={"training": {}, "fingerprint": ""}).content == manifest.content


def test_a_folder_that_fails_while_it_is_built_leaves_nothing(store: LocalStore, finished: ModelFolder) -> None:
    def build() -> None:
        with store.folder_for(f"{STAGE}/model") as folder:
            (folder / "half").write_bytes(b"x")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build()
    assert finished_model(store, STAGE) == finished
    assert list(store.root.rglob(".tmp*")) == []


def test_first_writer_wins_and_newest_version_wins(store: LocalStore) -> None:
    assert store.put_if_absent("a/b", b"1")
    assert not store.put_if_absent("a/b", b"2")
    assert store.read("a/b") == b"1"
    store.replace("a/b", b"3")
    assert store.read("a/b") == b"3"
    assert store.keys("a") == ["b"]
    assert store.keys("nowhere") == []


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x"])
def test_keys_stay_under_the_root(store: LocalStore, key: str) -> None:
    with pytest.raises(AssertionError):
        store.put_if_absent(key, b"")
    assert not (store.root.parent / "x").exists()


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=str(tmp_path / "file")) as caught:
        LocalStore(tmp_path / "file").check_writable()
    assert caught.value.exit_code == 4
    LocalStore(tmp_path / "new" / "folder").check_writable()
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    for address in ("gs://bucket/x", "s3://", "http://host/x"):
        with pytest.raises(SpecError, match=address):
            open_store(address)


def test_a_damaged_token_shard_is_named(tokenized: Any, tmp_path: Path) -> None:
    record = tokenized.manifest.train.record(tokenized.store, 1)
    folder = LocalStore(tmp_path)
    good = tokenized.store.read(f"{tokenized.folder}/train/{record.file}")
    assert len(read_tokens(tokenized.store, f"{tokenized.folder}/train", record).ids) == record.rows
    folder.put_if_absent(f"train/{record.file}", good[:100] + bytes([good[100] ^ 4]) + good[101:])
    with pytest.raises(IntegrityError, match=f"token shard train/{record.file}: sha256 mismatch") as caught:
        read_tokens(folder, "train", record)
    assert caught.value.exit_code == 5
