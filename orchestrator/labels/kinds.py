"""Label kinds: what a teacher says as compact columns of bytes, and back as targets of a loss.

A new kind is a class with the two steps in the middle in `labels/packing.py`, which knows nothing of torch, a module with the
other two, a variant of the `labels` section, and a line in `PACKINGS` and in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from orchestrator.labels.answer import Answer
from orchestrator.labels.dense import DenseKind
from orchestrator.labels.hidden import HiddenKind
from orchestrator.labels.layout import Arrays, Columns, Frame
from orchestrator.labels.sampled import Sampled
from orchestrator.labels.targets import Targets
from orchestrator.labels.topk import Topk
from orchestrator.spec.labels import Labels


class LabelKind(Protocol):
    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """Return the part of `answer` that is kept; `seeds` has bytes for each row, its own alone, for kinds that sample."""
        ...

    def pack(self, arrays: Arrays) -> Columns:
        """The rows of a row group as bytes."""
        ...

    def unpack(self, columns: Columns) -> Arrays:
        """Return the arrays that `pack` was given; raises `ValueError` for bytes that it never produces."""
        ...

    def targets(self, arrays: Arrays, temperature: float) -> Targets:
        """Targets with tensors [rows, seq, ...] of any rows, at a temperature that the kind is exact at."""
        ...


KINDS: dict[str, Callable[[Any, Frame], LabelKind]] = {
    "sampled": Sampled,
    "topk": Topk,
    "dense": DenseKind,
    "hidden": HiddenKind,
}


def label_kind(labels: Labels, frame: Frame) -> LabelKind:
    """The kind that `labels` asks for; raises `SpecError` if it cannot be had."""
    return KINDS[labels.kind](labels, frame)
