"""Files that are written on and on, such as a log, in a storage that knows only whole files."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.errors import EnvironmentFault, LockedError
from orchestrator.store.interface import StillOurs, Store, storage_faults

EVERY_S = 5.0


@contextmanager
def mirrored(store: Store, key: str, names: Sequence[str], still_ours: StillOurs, parent: Path) -> Generator[Path]:
    """A new folder in `parent` with the files called `names` of the folder `key`, as far as they are there.

    What is written in it is stored every `EVERY_S` seconds and at the end, while `still_ours`. A process that is killed loses
    what it wrote since the last time.
    """
    folder = parent / f"workspace-{uuid.uuid4().hex[:12]}"
    with storage_faults(folder):
        folder.mkdir()
        for name in names:
            with suppress(FileNotFoundError):
                (folder / name).write_bytes(store.read(f"{key}/{name}"))
    stored = _versions(folder)
    stop = threading.Event()

    def store_changes() -> None:
        still_ours()
        for name, version in _versions(folder).items():
            if stored.get(name) != version:
                store.replace(f"{key}/{name}", (folder / name).read_bytes())
                stored[name] = version

    def follow() -> None:
        while not stop.wait(EVERY_S):
            with suppress(EnvironmentFault, LockedError):  # the last time will tell
                store_changes()

    thread = threading.Thread(target=follow, name="mirror", daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        stop.set()
        thread.join()
        try:
            store_changes()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change and size of each file."""
    found = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".tmp")}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}
