"""Sums over held-out positions, and the figures that report.json has of one model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from orchestrator.errors import DataError
from orchestrator.evaluate.answers import Distribution
from orchestrator.evaluate.tokens import TeacherComparison
from orchestrator.models.router import active_parameters

ECE_BINS = 15


@dataclass
class Sums:
    """Running totals of one model over the positions seen so far, and single values by position."""

    correct: int = 0
    ce: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    kl: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    agree: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    bins: torch.Tensor = field(default_factory=lambda: torch.zeros(3, ECE_BINS, dtype=torch.float64))
    """Per confidence bin: count, confidence, correct."""

    def add(self, said: Distribution, targets: torch.Tensor) -> None:
        """Take in what the model `said` where `targets` [n] follow in the text."""
        confidence, choice = (values[:, 0] for values in said.top(1))
        right = choice == targets
        self.ce.append(-said.log_probs_of(targets).double().cpu())
        self.correct += int(right.sum())
        confidence = confidence.double().cpu()
        bin_of = (confidence * ECE_BINS).long().clamp(0, ECE_BINS - 1)
        for row, values in enumerate((torch.ones_like(confidence), confidence, right.double().cpu())):
            self.bins[row].index_add_(0, bin_of, values)

    def compare(self, teacher: Distribution, log_probs: torch.Tensor) -> None:
        """Take in how the model's `log_probs` [n, vocab] compare with what the `teacher` said in the same places."""
        self.kl.append(teacher.divergence(log_probs).double().cpu())
        self.agree.append((log_probs.argmax(-1) == teacher.top(1)[1][:, 0]).cpu())

    @property
    def comparison(self) -> TeacherComparison | None:
        """None where there was no teacher to compare with."""
        return TeacherComparison(torch.cat(self.kl).numpy(), torch.cat(self.agree).numpy()) if self.kl else None

    def nats_by_window(self, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Sums of cross entropy over each window [windows], which have `targets` [windows] each, in their order."""
        return np.add.reduceat(torch.cat(self.ce).numpy(), targets.cumsum() - targets)


def figures_of(name: str, sums: Sums, shape: PreTrainedModel, size_bytes: int) -> dict[str, float]:
    """The figures of the model `name` that has the `shape`; raises `DataError` if its cross entropy is not finite."""
    ce = float(torch.cat(sums.ce).mean())
    if not math.isfinite(ce):
        raise DataError(f"{name}: the held-out cross entropy is not finite")
    count, confidence, correct = sums.bins
    positions = float(count.sum())
    figures: dict[str, float] = {
        "params": sum(p.numel() for p in shape.parameters()),
        "active_params": active_parameters(shape),
        "heldout_ce_nats": ce,
        "heldout_ppl": perplexity(ce),
        "top1_accuracy": sums.correct / positions,
        "size_bytes": size_bytes,
        "ece": float((confidence - correct).abs().sum()) / positions,
    }
    comparison = sums.comparison
    if comparison is not None:
        figures["kl_to_teacher_nats"] = float(comparison.kl_nats.mean())
        figures["top1_agreement"] = float(comparison.same_top1.mean())
    return figures


def perplexity(ce: float) -> float:
    """exp(ce), infinite where a float cannot hold it: of a broken model whose cross entropy is still finite."""
    try:
        return math.exp(ce)
    except OverflowError:
        return math.inf


def gap_recovered(figures: Mapping[str, Mapping[str, float]]) -> float | None:
    """Share of the way from the baseline to the teacher that the student has come, in cross entropy.

    None where one of the three was not measured, or where there is no way between the two.
    """
    if not {"teacher", "student", "baseline"} <= figures.keys():
        return None
    teacher, student, baseline = (figures[n]["heldout_ce_nats"] for n in ("teacher", "student", "baseline"))
    return (baseline - student) / (baseline - teacher) if baseline != teacher else None
