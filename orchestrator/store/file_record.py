"""Files by content: how big they are, and the hash of what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class FileRecord(BaseModel):
    """A file by content."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_folder(folder: Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Size and hash of the files of `folder` (or of those called `names`), by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if names is None else [folder / n for n in sorted(names)]
    return {str(p.relative_to(folder)): FileRecord(sha256=sha256_of(p), bytes=p.stat().st_size) for p in files}


def describe_rest(folder: Path, described: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Size and hash of the files of `folder` that are not `described` yet, by relative name."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return describe_folder(folder, names - described.keys())
