"""Which documents are kept out of training, and how many windows either side then fills."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.spec.data import Data

FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Values of data.heldout_fraction to propose."""
WINDOWS = (512, 256, 128, 64, 32)
"""Values of data.seq_len to propose."""


def heldout_draw(content: str, seed: int) -> int:
    """A number below 2**64 for the document with the hex SHA-256 `content`.

    By content alone: the split does not depend on where a corpus lies, and copies of a text stay on one side.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()[:8], "big")


def is_heldout(draw: int, fraction: float) -> bool:
    """Return whether a document with this draw is kept out of training."""
    return draw < fraction * 2**64


@dataclass(frozen=True)
class Sized:
    """A document as far as the split goes."""

    piece: int
    """Windows never reach from one piece of a corpus into another."""
    draw: int
    tokens: float


@dataclass(frozen=True)
class Split:
    """Documents and whole windows on either side."""

    heldout_documents: int
    heldout: int
    train: int


def split(documents: Iterable[Sized], fraction: float, seq_len: int) -> Split:
    """Return the split that a held-out `fraction` makes of `documents`, in windows of `seq_len` + 1 tokens."""
    streams: dict[tuple[bool, int], float] = {}
    kept = 0
    for document in documents:
        held = is_heldout(document.draw, fraction)
        kept += held
        place = (held, document.piece)
        streams[place] = streams.get(place, 0.0) + document.tokens + 1  # a separator stands behind each
    windows = {side: sum(int((t - 1) // seq_len) for (held, _), t in streams.items() if held is side) for side in (True, False)}
    return Split(kept, windows[True], windows[False])


def remedy(documents: Sequence[Sized], data: Data) -> str:
    """Suggest a change with which both sides of `documents` fill a window, including a value that achieves it."""
    if len({document.draw for document in documents}) < 2:
        return "it needs several documents, for whole ones are kept for evaluation: cut it into parts, or add some"
    for fraction in sorted(FRACTIONS, key=lambda f: abs(f - data.heldout_fraction)):
        found = split(documents, fraction, data.seq_len)
        if found.heldout and found.train:
            return f"data.heldout_fraction {fraction:g} keeps {found.heldout_documents}, {_windows(found.heldout)}"
    for fraction in (data.heldout_fraction, *FRACTIONS):
        for seq_len in WINDOWS:
            found = split(documents, fraction, seq_len)
            if seq_len < data.seq_len and found.heldout and found.train:
                also = "" if fraction == data.heldout_fraction else f" with data.heldout_fraction {fraction:g}"
                return f"data.seq_len {seq_len}{also} makes {_windows(found.heldout)} of what is kept"
    return "add text"


def _windows(count: int) -> str:
    return f"{count} window{'s' if count > 1 else ''} or more"
