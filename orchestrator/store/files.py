"""The storage as the rest of the program knows it, and the one place that knows which storage an address means.

`Store` is the interface; an address is a directory that all nodes share (`store/local.py`) or an S3 bucket (`store/s3.py`).
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import SpecError
from orchestrator.store.file_record import sha256_of
from orchestrator.store.interface import UNFINISHED, HeldElsewhere, Lock, Part, StillOurs, Store, storage_faults, unguarded

__all__ = [
    "UNFINISHED",
    "HeldElsewhere",
    "Lock",
    "Part",
    "StillOurs",
    "Store",
    "local_folder",
    "open_store",
    "sha256_of",
    "storage_faults",
    "unguarded",
]


def open_store(root: str | Path) -> Store:
    """The storage at `root`, a directory or `s3://bucket/prefix`; raises `SpecError` for any other address."""
    scheme, separator, _ = str(root).partition("://")
    if not separator:
        from orchestrator.store.local import LocalStore

        return LocalStore(root)
    if scheme != "s3":
        raise SpecError(f"{root} is neither a directory nor s3://bucket/prefix")
    from orchestrator.store.s3 import S3Store  # the client library is loaded where it is used

    return S3Store(str(root))


def local_folder(address: str) -> Path:
    """The finished folder at `address`, in the storage or a user's own, as a folder on this node; raises as `Store.local`."""
    return open_store(address).local("")
