"""Export: the student as a Hugging Face folder that generates by itself, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from orchestrator.errors import EnvironmentFault
from orchestrator.export.card import model_card
from orchestrator.export.release import Release, beside, sources_of
from orchestrator.models.generation import GENERATION, check_folder, complete_folder
from orchestrator.models.hub import CARD
from orchestrator.store.files import open_store, storage_faults

MTP = "mtp"


def export_model(release: Release, target: str) -> None:
    """Write the student of `release` with its card to the address `target`; an earlier export stays until all is there.

    Tokenizer, chat template and generation settings are those that the teacher has now. Raises `EnvironmentFault` if `target`
    cannot be written or holds something that is no model, and `IntegrityError` for a model that does not fit its tokenizer.
    """
    store, job = open_store(target), release.job
    if Path(target).expanduser().is_symlink() or (store.exists("") and not store.exists("config.json")):
        raise EnvironmentFault(f"export.directory: {target} exists and is not a model folder; it is left alone")
    settings = json.loads(beside(release.teacher, GENERATION) or "{}")
    with store.folder_for("") as built, storage_faults(built):
        left_out = None if job.export.mtp == "keep" else shutil.ignore_patterns(MTP)
        shutil.copytree(release.student.path, built, ignore=left_out, dirs_exist_ok=True)
        tokenizer = release.store.local(release.tokens.tokenizer)
        complete_folder(built, tokenizer, release.tokens.manifest.seq_len, settings)
        check_folder(built)
        (built / CARD).write_text(model_card(release, sources_of(release), built), "utf-8")
