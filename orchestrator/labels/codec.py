"""All that is kept of a teacher's answer: its distributions in the kind asked for, and chosen inner features beside them."""

from __future__ import annotations

import torch

from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import label_kind
from orchestrator.labels.layout import Arrays, Columns, Frame, rows_of
from orchestrator.labels.targets import Targets
from orchestrator.labels.vectors import Vectors
from orchestrator.spec.labels import Labels


class Codec:
    """The `labels` section at work; the same four steps as a label kind, and the features."""

    def __init__(self, labels: Labels, frame: Frame) -> None:
        self._kind = label_kind(labels, frame)
        kept = labels.features
        self._features = {f.name: Vectors(f.name, kept, frame) for f in kept.keep} if kept else {}

    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """Return the part of `answer` that is kept; `seeds` has bytes for each row, which depend on that row alone."""
        arrays = self._kind.extract(answer, seeds)
        for name, vectors in self._features.items():
            arrays |= vectors.extract(answer.features[name])
        return arrays

    def pack(self, arrays: Arrays) -> Columns:
        """The rows of a row group as bytes."""
        columns = self._kind.pack(arrays)
        for vectors in self._features.values():
            columns |= vectors.pack(arrays)
        return columns

    def pack_groups(self, arrays: Arrays, group_rows: int) -> list[Columns]:
        """The rows of a whole shard as bytes, a row group after another."""
        rows = len(next(iter(arrays.values())))
        return [self.pack(rows_of(arrays, slice(start, start + group_rows))) for start in range(0, rows, group_rows)]

    def unpack(self, columns: Columns) -> Arrays:
        """Return the arrays that `pack` was given; raises `ValueError` for bytes that it never produces."""
        arrays = self._kind.unpack(columns)
        for vectors in self._features.values():
            arrays |= vectors.unpack(columns)
        return arrays

    def targets(self, arrays: Arrays, temperature: float) -> Targets:
        """The teacher's distributions for any rows, tensors [rows, seq, ...]."""
        return self._kind.targets(arrays, temperature)

    def features(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        """The features by name, [rows, seq, width]."""
        return {name: vectors.tensor(arrays) for name, vectors in self._features.items()}
