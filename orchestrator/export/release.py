"""The parts of an export, and the facts about the models that its student was made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from orchestrator.models.hub import CARD, checkpoint_folder
from orchestrator.spec.job import Job
from orchestrator.spec.model import CheckpointStudent, GgufTeacher, PretrainTeacher, Teacher, UpcycledStudent
from orchestrator.store.files import Store, open_store
from orchestrator.store.records import ModelFolder, Tokens

LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Release:
    """All that an export is made of."""

    job: Job
    store: Store
    tokens: Tokens
    teacher: ModelFolder
    student: ModelFolder
    report: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A model that the student was made from."""

    text: str
    """As in: distilled from ..."""
    on_hub: str | None
    licence: dict[str, str] = field(default_factory=dict[str, str])
    """The values of `LICENCE_KEYS` that its own card has."""

    @classmethod
    def of_teacher(cls, teacher: Teacher, card: str) -> Source:
        """`card` is the text of the README.md beside it."""
        if isinstance(teacher, PretrainTeacher):
            return cls("a teacher that was trained from scratch on the same data", None)
        if isinstance(teacher, GgufTeacher):
            return cls(f"`{shown(teacher.file or teacher.package or '')}`", None, licence_of(card))
        return cls(f"`{shown(teacher.path)}`", hub_name(teacher.path), licence_of(card))

    @classmethod
    def of_start(cls, path: str, card: str) -> Source:
        """A checkpoint that training began from."""
        return cls(f"`{shown(path)}`", hub_name(path), licence_of(card))


def sources_of(release: Release) -> list[Source]:
    """The models that the student was made from, the teacher first."""
    job = release.job
    found = [Source.of_teacher(job.teacher, beside(release.teacher, CARD))]
    if isinstance(job.student, CheckpointStudent | UpcycledStudent):
        start = checkpoint_folder(job.student.path, job.student.revision, "student.path") / CARD
        found.append(Source.of_start(job.student.path, start.read_text("utf-8", "replace") if start.is_file() else ""))
    return found


def beside(model: ModelFolder, name: str) -> str:
    """The text file `name` in the folder of `model`; empty if there is none. The weights stay where they are."""
    try:
        return open_store(model.address).read(name).decode(errors="replace")
    except FileNotFoundError:
        return ""


def licence_of(card: str) -> dict[str, str]:
    """Return the licence fields from the front matter of a model's `card`; empty where there are none that can be read."""
    try:
        data = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in LICENCE_KEYS if isinstance(data.get(key), str)}


def shown(path: str) -> str:
    """A hub name or a relative path as it is; of an absolute one the end alone, for the card is made to be published."""
    return Path(path).name if path.startswith(("/", "~")) else path


def hub_name(path: str) -> str | None:
    """`path` if it names something on the hub, which alone front matter may refer to."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return None if path.startswith((".", "~")) or Path(path).exists() else path
