"""Teachers that exist already: found, checked, and brought into one form, a folder with safetensors and tokenizer.

A local folder is used where it lies, which every node must be able to open. What comes from a hub lies in a cache of the
driver's node, so it is copied into the storage, under a key that holds its content; what is there already is reused.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import ray

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.models.head import head_tensors
from orchestrator.models.hub import CARD, INDEX, checkpoint_folder, vocab_size_of, weight_files
from orchestrator.models.tokenizer import tokenizer_files
from orchestrator.plan.checkpoint import local_checkpoint
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.spec.model import GgufTeacher, TransformersTeacher
from orchestrator.store.files import Store, local_folder
from orchestrator.store.hashes import describe_known
from orchestrator.store.records import MANIFEST, MODEL, ModelFolder, ModelManifest, Record, finish_model, finished_model

BESIDE = ("generation_config.json", INDEX, CARD)
"""Files of a model on a hub that are copied beside those that say what it computes."""


class _Imported(Record):
    """The place in the storage of the model that a name on a hub stood for when it was last fetched."""

    key: str


def fetch_teacher(store: Store, teacher: TransformersTeacher | GgufTeacher) -> ModelFolder:
    """Return the teacher's folder with the hashes of its files; raises `SpecError` if it lacks what a teacher needs.

    A hub that cannot be reached is no error for a name whose model is in the storage.
    """
    if isinstance(teacher, GgufTeacher):
        return _converted_gguf(store, teacher)
    on_hub = local_checkpoint(teacher.path) is None
    name = f"names/{fingerprint('hub', teacher.path, teacher.revision)}.json"
    try:
        folder = checkpoint_folder(teacher.path, teacher.revision, "teacher.path")
    except EnvironmentFault:
        imported = _Imported.load(store, name)
        found = None if imported is None else _in_storage(store, imported.key)
        if found is None:
            raise
        return found
    described = _described(store, teacher.path, folder)
    if not on_hub:
        return ModelFolder(str(folder), described)
    found = _import(store, folder, described)
    _Imported(key=found[0]).save(store, name)
    return found[1]


def _described(store: Store, path: str, folder: Path) -> ModelManifest:
    """Return the manifest of the teacher in `folder`, which the job file calls `path`."""
    if not (folder / "tokenizer.json").is_file():
        raise SpecError(f"teacher.path: {folder} has no tokenizer.json")
    head_tensors(folder, "teacher.path")  # refuses a model without a head before anything is labelled
    names = ["config.json", *(file.name for file in weight_files(folder)), *tokenizer_files(folder)]
    ids = vocab_size_of(folder, "teacher.path")
    return ModelManifest(fingerprint=path, files=describe_known(store, folder, names), vocab_size=ids)


def _import(store: Store, source: Path, described: ModelManifest) -> tuple[str, ModelFolder]:
    """Copy a model from the cache of a hub into the storage, unless it is there; returns its key and its folder there."""
    beside = describe_known(store, source, [name for name in BESIDE if (source / name).is_file()])
    key = f"teacher/{fingerprint('hub', described.files, beside)}"
    found = _in_storage(store, key)
    if found is None:
        with store.folder_for(f"{key}/{MODEL}") as folder:
            for name in {**described.files, **beside}:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)  # a cache holds links
        described.save(store, f"{key}/{MANIFEST}")
        found = ModelFolder(store.address(f"{key}/{MODEL}"), described)
    return key, found


def _in_storage(store: Store, key: str) -> ModelFolder | None:
    """Return the model that was imported under `key`; None if there is none, or if its files have changed since."""
    manifest = ModelManifest.load(store, f"{key}/{MANIFEST}")
    try:
        files = {} if manifest is None else describe_known(store, store.local(f"{key}/{MODEL}"), manifest.files)
    except FileNotFoundError:
        return None
    return ModelFolder(store.address(f"{key}/{MODEL}"), manifest) if manifest and files == manifest.files else None


def _converted_gguf(store: Store, teacher: GgufTeacher) -> ModelFolder:
    origin, name = _gguf_file(store, teacher)
    sha256 = describe_known(store, local_folder(origin), [name])[name].sha256
    stage_key = f"teacher/{fingerprint('gguf', sha256, teacher.dtype)}"
    done = finished_model(store, stage_key)
    if done is None:
        ray.get(_convert_task.remote(store, stage_key, origin, name, teacher.dtype))
        folder = store.local(f"{stage_key}/{MODEL}")
        done = finish_model(store, stage_key, vocab_size_of(folder, "teacher"), {})
    return done


def _gguf_file(store: Store, teacher: GgufTeacher) -> tuple[str, str]:
    """Return the address of the folder that holds the teacher's file, and the name of the file."""
    if teacher.file is not None:
        file = Path(teacher.file).expanduser().absolute()
        if not file.is_file():
            raise SpecError(f"teacher.file: {teacher.file} does not exist")
        return str(file.parent), file.name
    assert teacher.package is not None
    key, name = f"teacher/{teacher.package}", f"{teacher.package}.gguf"
    if not store.exists(key):
        try:
            package = importlib.import_module(teacher.package)
        except ImportError as error:
            raise EnvironmentFault(f"teacher.package: {teacher.package} is not installed (extra [gemma])") from error
        with store.folder_for(key) as folder:
            package.assemble(str(folder / name))
    return store.address(key), name


@ray.remote(num_cpus=1)
def _convert_task(store: Store, stage_key: str, origin: str, name: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.models.build import DTYPES

    with store.folder_for(f"{stage_key}/{MODEL}") as folder:
        source = {"pretrained_model_name_or_path": local_folder(origin), "gguf_file": name, "trust_remote_code": False}
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=DTYPES[dtype])
        # Its weights are plain tensors by now; transformers still thinks of it as quantized and would not save it.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
