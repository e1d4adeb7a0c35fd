"""Label kinds: the teacher's logits as compact columns of bytes, and back as sparse targets.

A kind writes for each row one bytes value per column and reads them back as `SparseTargets`. A new kind is a module, a
variant of the `labels` section, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from orchestrator.labels.sampled import Sampled
from orchestrator.labels.targets import Columns, SparseTargets
from orchestrator.labels.topk import Topk
from orchestrator.spec.distill import Labels


class LabelKind(Protocol):
    def encode(self, logits: torch.Tensor, seeds: list[bytes]) -> Columns:
        """Columns for `logits` [rows, seq, vocab]; `seeds` holds 16 bytes a row for kinds that draw."""
        ...

    def decode(self, columns: Columns, temperature: float) -> SparseTargets:
        """Targets [rows, seq, k] at one of the stored temperatures."""
        ...


KINDS: dict[str, Callable[[Any, int], LabelKind]] = {"sampled": Sampled, "topk": Topk}


def label_kind(labels: Labels, vocab_size: int) -> LabelKind:
    """The kind that `labels` asks for, over ids below `vocab_size`; raises `SpecError` if it cannot be had."""
    return KINDS[labels.kind](labels, vocab_size)
