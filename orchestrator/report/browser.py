"""Shows a page to whoever sits at this machine."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from orchestrator.runtime.environment import has_display


def open_page(page: Path) -> bool:
    """Open the HTML file `page` in the user's browser; False where there is no display or no browser."""
    return has_display() and webbrowser.open(page.absolute().as_uri())
