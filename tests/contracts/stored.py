"""Files and folders to store, looked at from outside, and damaged behind the back of a store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.store.files import Store
from orchestrator.store.local import LocalStore
from tests.s3 import BUCKET, Server

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 100, "part/empty": b"", "part/a b+c": b"x"}


def build(store: Store, key: str, files: dict[str, bytes]) -> None:
    with store.folder_for(key) as folder:
        write(folder, files)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def damage(store: Store, server: Server, key: str, content: bytes) -> None:
    """Change a stored file behind the back of `store`."""
    if isinstance(store, LocalStore):
        store.path(key).write_bytes(content)
    else:
        server.write(store.address(key).removeprefix(f"s3://{BUCKET}/"), content)


def eventually(condition: Callable[[], Any], patience_s: float = 30.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
