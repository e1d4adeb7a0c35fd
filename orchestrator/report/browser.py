"""Shows a page to whoever sits at this machine."""

from __future__ import annotations

import tempfile
import webbrowser
from pathlib import Path

from orchestrator.runtime.environment import has_display
from orchestrator.store.files import Store


def open_page(page: Path) -> bool:
    """Open the HTML file `page` in the user's browser; False where there is no display or no browser."""
    return has_display() and webbrowser.open(page.absolute().as_uri())


def local_page(directory: Store, name: str) -> Path:
    """The page `name` of a run directory as a file on this machine: itself, or a temporary copy of one in a bucket.

    Raises `FileNotFoundError` if it is not there.
    """
    content, page = directory.read(name), Path(directory.address(name))
    if not page.exists():
        page = Path(tempfile.mkdtemp(prefix="distill-")) / name
        page.write_bytes(content)
    return page
