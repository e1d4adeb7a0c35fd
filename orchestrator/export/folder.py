"""Export: the student as a Hugging Face folder that generates by itself, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.export.card import model_card
from orchestrator.export.release import Release, beside, sources_of
from orchestrator.models.generation import GENERATION, check_folder, complete_folder
from orchestrator.models.hub import CARD
from orchestrator.spec.reader import clip
from orchestrator.store.files import open_store, storage_faults

MTP = "mtp"
ORIGIN = "distill.json"
"""Which run made an export, in its folder: `run` and `identity`."""


def check_target(target: str, origin: Mapping[str, str]) -> None:
    """Raise unless the run that `origin` names may export to the address `target`: nothing is there, or its own export.

    `EnvironmentFault` for something that is no model, `SpecError` for a model that this run did not make.
    """
    store = open_store(target)
    if Path(target).expanduser().is_symlink() or (store.exists("") and not store.exists("config.json")):
        raise EnvironmentFault(f"export.directory: {target} exists and is not a model folder; it is left alone")
    made_by = store.read_json(ORIGIN) or {}
    if store.exists("") and made_by != origin:
        what = f"the export of run {made_by['run']}" if "run" in made_by else "a model that this run did not export"
        shown = clip(target.rstrip("/"), 70)
        raise SpecError(
            f"export.directory: {shown} holds {what}, which is left alone; set it to {shown}-{origin['run']}, or to null for a "
            "folder in the run directory"
        )


def export_model(release: Release, target: str, origin: Mapping[str, str]) -> None:
    """Write the student of `release` with its card to the address `target`; an earlier export of it stays until all is there.

    `origin` names the run. Tokenizer, chat template and generation settings are those that the teacher has now. Raises as
    `check_target` does, `EnvironmentFault` if `target` cannot be written, and `IntegrityError` for a model that does not fit
    its tokenizer.
    """
    check_target(target, origin)
    store, job = open_store(target), release.job
    settings = json.loads(beside(release.teacher, GENERATION) or "{}")
    with store.folder_for("") as built, storage_faults(built):
        left_out = None if job.export.mtp == "keep" else shutil.ignore_patterns(MTP)
        shutil.copytree(release.student.path, built, ignore=left_out, dirs_exist_ok=True)
        tokenizer = release.store.local(release.tokens.tokenizer)
        complete_folder(built, tokenizer, release.tokens.manifest.seq_len, settings)
        check_folder(built)
        (built / ORIGIN).write_text(json.dumps(origin))
        (built / CARD).write_text(model_card(release, sources_of(release), built), "utf-8")
