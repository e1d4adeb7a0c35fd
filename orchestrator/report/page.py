"""The frame that all pages of this project share: their templates, and figures that a browser draws without a network.

A page extends `base.html.j2` and is given `page_title`, `figures` (by the name of their `chart-NAME` element, from
`script_json`) and `plotly` (from `plotly_script`, or empty if there is nothing to draw).
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.report import words

_HERE = Path(__file__).parent
_PLOTLY = _HERE / "assets" / "plotly-basic.min.js.gz"
"""plotly.js-basic-dist-min 4.1.1 of npm, gzipped: scatter, bar and pie traces. MIT, see plotly.LICENSE beside it."""


def templates(*folders: Path) -> Environment:
    """The templates in `folders` and beside this module; what they are given is escaped in `*.html.j2` alone."""
    environment = Environment(
        loader=FileSystemLoader([*folders, _HERE]),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    formats = (
        words.number,
        words.perplexity,
        words.count,
        words.short,
        words.size,
        words.percent,
        words.nats,
        words.seconds,
        markdown,
    )
    environment.filters |= {f.__name__: f for f in formats}
    return environment


def plotly_script() -> Markup:
    """plotly.js as base64 of its gzipped text: a third of its size, unpacked by the browser (`base.html.j2`)."""
    return Markup(base64.b64encode(_PLOTLY.read_bytes()).decode())


def script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element whatever strings it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def markdown(text: object) -> str:
    """`text` in one line of Markdown that shows it as it is, in which nothing of it is taken for markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))
