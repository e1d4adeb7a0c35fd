"""Students that do not start from nothing: brought, pruned from the teacher, or made into a mixture of experts.

Made once, before training, as a folder in the storage: every worker, the baseline and any later run start from the same. Its
tensors have the names that they have in the model, so that a worker can read those it needs one by one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ray
import torch
from transformers import PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.models.build import load_model, resize_vocabulary
from orchestrator.models.hub import checkpoint_folder, vocab_size_of, weights_and_configuration
from orchestrator.models.importance import importance
from orchestrator.models.prune import check_prunable, prune
from orchestrator.models.share import plainly_named
from orchestrator.models.upcycle import upcycle
from orchestrator.plan.fingerprint import fingerprint
from orchestrator.spec.model import CheckpointStudent, PrunedStudent, UpcycledStudent
from orchestrator.store.files import HeldElsewhere, Lock, StillOurs, Store
from orchestrator.store.records import MODEL, ModelFolder, TokenManifest, describe_folder, finish_model, finished_model
from orchestrator.store.shards import read_tokens
from orchestrator.student.job import Initial

INITIAL_VERSION = 2
"""Raised when the code makes other files of the same origin."""
CALIBRATION_ROWS_AT_A_TIME = 4


@dataclass(frozen=True)
class Origin:
    """The inputs that determine a student's first weights."""

    store: Store
    student: CheckpointStudent | PrunedStudent | UpcycledStudent
    teacher: ModelFolder
    seed: int
    token_folder: str
    manifest: TokenManifest

    @cached_property
    def folder(self) -> Path:
        """The checkpoint that they are made from.

        Raises `SpecError` for one that is not there or does not share the teacher's vocabulary.
        """
        if isinstance(self.student, PrunedStudent):
            return self.teacher.path
        folder = checkpoint_folder(self.student.path, self.student.revision, "student.path")
        if not (folder / "tokenizer.json").is_file():
            raise SpecError(f"student.path: {folder} has no tokenizer.json, so nobody knows whether its ids are the teacher's")
        if _vocabulary(folder) != _vocabulary(self.teacher.path):
            raise SpecError(f"student.path: the tokenizer of {folder} has other ids for its tokens than the teacher's")
        ids, wanted, given = vocab_size_of(folder, "student.path"), self.vocab_size, _given_ids(folder)
        if ids != wanted and not (self._may_be_padded and given <= min(ids, wanted)):
            raise SpecError(
                f"student.path: the vocabulary of {folder} has {ids} ids, the teacher's {wanted}, the tokenizer gives {given}; "
                "if they differ in padding only, set student.vocab_alignment: truncate_padding"
            )
        return folder

    @property
    def vocab_size(self) -> int:
        """Ids that the student is to know: the teacher's."""
        return self.teacher.manifest.vocab_size

    @property
    def _may_be_padded(self) -> bool:
        return isinstance(self.student, CheckpointStudent) and self.student.vocab_alignment == "truncate_padding"

    @cached_property
    def key(self) -> str:
        if isinstance(self.student, PrunedStudent):
            source = [self.teacher.manifest.content, self.manifest.content]
        else:
            files = describe_folder(self.folder, [file.name for file in weights_and_configuration(self.folder)])
            seed = self.seed if isinstance(self.student, UpcycledStudent) else None
            source = [{name: record.sha256 for name, record in files.items()}, seed]
        made = self.student.model_dump(mode="json", exclude={"mtp_depth", "mtp_weight", "path", "revision"})
        return fingerprint("initial", INITIAL_VERSION, made, source)

    @property
    def stage(self) -> str:
        return f"initial/{self.key}"


def finished_initial(origin: Origin) -> Initial | None:
    """Return the initial weights that an earlier run made from `origin`; None if none did."""
    done = finished_model(origin.store, origin.stage)
    return None if done is None else Initial(folder=done.address, content=done.manifest.content)


def make_initial(origin: Origin, lock: Lock) -> Initial:
    """Make the first weights, under the lock of their stage; raises `SpecError` for an architecture or sizes that do not
    allow it, and `LockedError` if the lock was lost meanwhile."""
    ray.get(_make_task.remote(origin, HeldElsewhere(origin.store, f"{origin.stage}/lock", lock.token)))
    lock()
    done = finish_model(origin.store, origin.stage, origin.vocab_size, {})
    return Initial(folder=done.address, content=done.manifest.content)


@ray.remote(num_cpus=1)
def _make_task(origin: Origin, still_ours: StillOurs) -> None:
    made = None if _as_it_is(origin) else _made(origin)
    with origin.store.folder_for(f"{origin.stage}/{MODEL}", still_ours) as folder:
        if made is not None:
            made.save_pretrained(folder, save_original_format=False)
        else:
            for file in weights_and_configuration(origin.folder):
                shutil.copy(file, folder)


def _as_it_is(origin: Origin) -> bool:
    """Return whether the checkpoint's files can be used directly, so that no process has to hold its weights."""
    if not isinstance(origin.student, CheckpointStudent) or not plainly_named(origin.folder):
        return False
    return vocab_size_of(origin.folder, "student.path") == origin.vocab_size


def _made(origin: Origin) -> PreTrainedModel:
    model, student = load_model(origin.folder, "fp32", torch.device("cpu")), origin.student
    if isinstance(student, UpcycledStudent):
        return upcycle(model, student.experts, student.experts_per_token, student.noise, origin.seed, "student")
    if isinstance(student, PrunedStudent):
        check_prunable(model, student, "student")
        batches = _rows(origin, student.calibration_rows).split(CALIBRATION_ROWS_AT_A_TIME)
        return prune(model, student, importance(model, batches), "student")
    resize_vocabulary(model, origin.vocab_size)
    return model


def _rows(origin: Origin, count: int) -> torch.Tensor:
    """The first `count` training windows, [count, seq], or all there are."""
    parts: list[torch.Tensor] = []
    for record in origin.manifest.train.records(origin.store):
        parts.append(torch.from_numpy(read_tokens(origin.store, origin.token_folder, record).ids[:, :-1]).long())
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]


def _vocabulary(folder: Path) -> object:
    return json.loads((folder / "tokenizer.json").read_text())["model"].get("vocab")


def _given_ids(folder: Path) -> int:
    """Return the number of ids, from 0 on, that the tokenizer in `folder` gives."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"].get("vocab", {})
    listed = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*listed, *(token["id"] for token in tokenizer.get("added_tokens", []))], default=-1)
