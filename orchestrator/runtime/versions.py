"""Which code runs here."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("distill-orchestrator", "ray", "torch", "deepspeed", "transformers", "mlflow", "pyarrow", "tokenizers")
PACKAGE_FOLDER = Path(__file__).parent.parent
"""The package `orchestrator` as it runs here."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def own_version() -> str:
    """Version of this package, with the digest of its source."""
    try:
        installed = version(PACKAGES[0])
    except PackageNotFoundError:
        installed = "not installed"
    return f"{installed} (source {code_digest()})"


def code_digest() -> str:
    """12 hex digits over the source of `orchestrator`, which changes more often than its version does."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE_FOLDER.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE_FOLDER).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def git_commit() -> str | None:
    """Commit of the checkout that this code is part of; None for an installed package, and where there is no git."""
    try:
        for arguments in (["ls-files", "--error-unmatch", __file__], ["rev-parse", "HEAD"]):
            command = ["git", "-C", str(PACKAGE_FOLDER), *arguments]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.strip()
