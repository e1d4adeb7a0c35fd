"""Losses between inner layers: the objective's feature and relation terms over the layer pairs they ask for."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orchestrator.errors import SpecError
from orchestrator.losses.features import Projector, activation_clone, cosine, layer_map, mse
from orchestrator.losses.relations import cka, gram, minilm, rkd_angle, rkd_distance
from orchestrator.spec.labels import feature_name
from orchestrator.spec.objective import CloneTerm, FeatureTerm, MinilmTerm, RelationTerm

Tensor = torch.Tensor
RELATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "gram": gram,
    "cka": cka,
}


@dataclass(frozen=True)
class Link:
    """One term on one pair of layers."""

    term: Any
    student: str
    teacher: str
    """Names of the features on both sides."""


def links(terms: tuple[FeatureTerm, ...], student_layers: int, teacher_layers: int) -> tuple[Link, ...]:
    """All pairs of features that `terms` compare; raises `SpecError` for a layer that is not there."""
    found: list[Link] = []
    for term in terms:
        for student, teacher in layer_map(teacher_layers, student_layers, term.layers):
            found.append(Link(term, feature_name(term.part, student), feature_name(term.part, teacher)))
    return tuple(found)


class InnerLoss(nn.Module):
    """The weighted sum of all terms, with the projectors that they learn along with the student."""

    def __init__(
        self, linked: tuple[Link, ...], student_widths: Mapping[str, int], teacher_widths: Mapping[str, int], seed: int
    ) -> None:
        super().__init__()
        self._links = linked
        self.student_features = tuple({link.student: None for link in linked})
        """Names of what is needed of the student."""
        self.projectors = nn.ModuleList()
        for i, link in enumerate(linked):
            ours, theirs = student_widths[link.student], teacher_widths[link.teacher]
            if isinstance(link.term, MinilmTerm) and (ours % link.term.heads or theirs % link.term.heads):
                raise SpecError(f"objective.features: {link.term.heads} heads do not divide the widths {ours} and {theirs}")
            if isinstance(link.term, MinilmTerm | RelationTerm):
                self.projectors.append(nn.Identity())  # relations need no common width
            elif isinstance(link.term, CloneTerm):
                # Fixed: a learned map and the student could shrink together to a perfect match of nothing.
                self.projectors.append(Projector(theirs, ours, seed + i).requires_grad_(False))
            else:
                self.projectors.append(Projector(ours, theirs, seed + i))

    def forward(self, teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Tensor:
        """The sum over all pairs of weight times mean loss, a scalar; features are [rows, seq, width] by name."""
        parts = [
            link.term.weight
            / sum(other.term is link.term for other in self._links)
            * _mean_loss(link.term, projector, teacher[link.teacher], student[link.student])
            for link, projector in zip(self._links, self.projectors, strict=True)
        ]
        return torch.stack(parts).sum()


def _mean_loss(term: FeatureTerm, projector: nn.Module, teacher: Tensor, student: Tensor) -> Tensor:
    if isinstance(term, MinilmTerm):
        return minilm(teacher, student, term.heads).mean()
    if isinstance(term, RelationTerm):
        # Not the first position: it has no context, and where a model parks its attention its states dwarf all others.
        chosen = torch.linspace(1, teacher.shape[1] - 1, min(term.points, teacher.shape[1] - 1)).long()
        pairs = zip(teacher[:, chosen], student[:, chosen], strict=True)
        return torch.stack([RELATIONS[term.kind](ours, theirs) for ours, theirs in pairs]).mean()
    if isinstance(term, CloneTerm):
        assert isinstance(projector, Projector)
        return activation_clone(teacher, student, projector).mean()
    return (mse if term.kind == "mse" else cosine)(teacher, projector(student)).mean()
