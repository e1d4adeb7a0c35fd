"""Where a benchmark leaves what it has measured, and on what."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def machine() -> str:
    """The kind of processor."""
    return platform.processor() or platform.machine()


def keep(name: str, result: dict[str, Any]) -> None:
    """Write `result` to results/NAME.json, and print it as one line."""
    file = Path(__file__).parent / "results" / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
