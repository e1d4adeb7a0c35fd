"""Teachers that exist already: found, checked, and brought into one form, a folder with safetensors and tokenizer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import ray

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.models.head import head_tensors
from orchestrator.models.hub import checkpoint_folder, vocab_size_of, weight_files
from orchestrator.models.tokenizer import tokenizer_files
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.spec.model import GgufTeacher, TransformersTeacher
from orchestrator.store.files import Store, local_folder, sha256_of
from orchestrator.store.records import MODEL, ModelFolder, ModelManifest, describe_folder, finish_model, finished_model


def fetch_teacher(store: Store, teacher: TransformersTeacher | GgufTeacher) -> ModelFolder:
    """The teacher's folder, hashed; raises `SpecError` if it lacks what a teacher needs."""
    if isinstance(teacher, GgufTeacher):
        return _converted_gguf(store, teacher)
    folder = checkpoint_folder(teacher.path, teacher.revision, "teacher.path")
    if not (folder / "tokenizer.json").is_file():
        raise SpecError(f"teacher.path: {folder} has no tokenizer.json")
    head_tensors(folder, "teacher.path")  # what hidden states are nothing without; told before anything is labelled
    files = describe_folder(folder, ["config.json", *(file.name for file in weight_files(folder)), *tokenizer_files(folder)])
    ids = vocab_size_of(folder, "teacher.path")
    return ModelFolder(str(folder), ModelManifest(fingerprint=teacher.path, files=files, vocab_size=ids))


def _converted_gguf(store: Store, teacher: GgufTeacher) -> ModelFolder:
    origin, name = _gguf_file(store, teacher)
    stage_key = f"teacher/{fingerprint('gguf', sha256_of(local_folder(origin) / name), teacher.dtype)}"
    done = finished_model(store, stage_key)
    if done is None:
        ray.get(_convert_task.remote(store, stage_key, origin, name, teacher.dtype))
        folder = store.local(f"{stage_key}/{MODEL}")
        done = finish_model(store, stage_key, vocab_size_of(folder, "teacher"), {})
    return done


def _gguf_file(store: Store, teacher: GgufTeacher) -> tuple[str, str]:
    """Address of the folder that holds the teacher's file, and the name of the file."""
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
