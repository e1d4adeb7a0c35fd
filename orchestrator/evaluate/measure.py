"""Quality, agreement, calibration, speed and size of models on the same held-out windows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import ray
import torch
from transformers import PreTrainedModel

from orchestrator.errors import DataError
from orchestrator.evaluate.speculate import Acceptance, acceptance
from orchestrator.models.build import device, load_model
from orchestrator.models.head import last_hidden, output_head
from orchestrator.models.mtp import load_mtp
from orchestrator.models.router import active_parameters
from orchestrator.plan.memory import head_rows
from orchestrator.runtime.environment import limit_threads
from orchestrator.store.files import Store, local_folder
from orchestrator.store.records import TokenManifest
from orchestrator.store.shards import read_tokens

ECE_BINS = 15


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    address: str
    """Of its folder."""
    dtype: Literal["bf16", "fp32", "fp8"]
    """What it was trained in; fp8 is measured as the bf16 that it is saved in."""

    @property
    def folder(self) -> Path:
        """On this node."""
        return local_folder(self.address)

    @property
    def size_bytes(self) -> int:
        """Of the model's weights, without multi-token-prediction modules beside it."""
        return sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))


@dataclass
class _Sums:
    """Totals over all positions of one model."""

    positions: int = 0
    ce: float = 0.0
    correct: int = 0
    kl: float = 0.0
    agree: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.bins = torch.zeros(3, ECE_BINS, dtype=torch.float64)
        """Per confidence bin: count, confidence, correct."""


@dataclass(frozen=True)
class Heldout:
    """Windows that no training has seen, at most `rows` of them."""

    store: Store
    data_folder: str
    manifest: TokenManifest
    rows: int

    def windows(self) -> torch.Tensor:
        """The windows, evenly from as many shards as `rows` allows: [rows, seq + 1]."""
        shards = self.manifest.heldout
        count = min(self.rows, len(shards))
        chosen = [shards[i * len(shards) // count] for i in range(count)]
        each, over = divmod(self.rows, count)
        parts = [
            read_tokens(self.store, f"{self.data_folder}/heldout", record).ids[: each + (i < over)]
            for i, record in enumerate(chosen)
        ]
        return torch.from_numpy(np.concatenate(parts)).long()


def measure(heldout: Heldout, subjects: dict[str, Subject], micro_batch: int, cpus: int) -> dict[str, dict[str, float]]:
    """Figures of each subject by name, as report.json has them; KL and agreement are against `teacher`.

    Raises `DataError` if a model's loss on the held-out windows is not finite.
    """
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = _measure_task.options(num_cpus=cpus, num_gpus=gpus)
    return ray.get(task.remote(heldout, subjects, micro_batch, cpus, gpus))


@ray.remote
def _measure_task(
    heldout: Heldout, subjects: dict[str, Subject], micro_batch: int, cpus: int, gpus: int
) -> dict[str, dict[str, float]]:
    limit_threads(cpus)
    torch.set_num_threads(cpus)
    on = device(gpus)
    windows = heldout.windows().to(on)
    models = {
        name: load_model(subjects[name].folder, subjects[name].dtype, on) for name in sorted(subjects, key="teacher".__ne__)
    }
    sums = {name: _Sums() for name in models}
    for model in models.values():  # first calls build caches; they would distort the speed of whoever comes first
        model(input_ids=windows[:1, :-1], use_cache=False)
    for part in windows.split(micro_batch):
        _measure_part(models, sums, part)
    figures = {name: _figures(name, sums[name], models[name], subjects[name]) for name in subjects}
    for name, model in models.items():
        figures[name] |= _ahead(model, subjects[name].folder, windows, micro_batch)
    return figures


@torch.inference_mode()
def _measure_part(models: dict[str, PreTrainedModel], sums: dict[str, _Sums], windows: torch.Tensor) -> None:
    """Add what every model, the teacher first, says about `windows` [rows, seq + 1], a chunk of positions at a time."""
    hidden: dict[str, torch.Tensor] = {}
    for name, model in models.items():
        started = time.perf_counter()
        hidden[name] = last_hidden(model, windows[:, :-1]).flatten(0, 1)
        sums[name].seconds += time.perf_counter() - started
    heads = {name: output_head(model) for name, model in models.items()}
    chunk = head_rows(len(heads["teacher"].weight), windows.is_cuda)
    for start, target in enumerate(windows[:, 1:].flatten().split(chunk)):
        states = slice(start * chunk, start * chunk + len(target))
        teacher: torch.Tensor | None = None
        for name, head in heads.items():
            started = time.perf_counter()
            log_probs = head(hidden[name][states]).log_softmax(-1)
            sums[name].seconds += time.perf_counter() - started
            teacher = log_probs if teacher is None else teacher
            _accumulate(sums[name], log_probs, teacher, target)


def _accumulate(sums: _Sums, log_probs: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> None:
    top, choice = log_probs.max(-1)
    right = choice == target
    sums.positions += len(target)
    sums.ce -= float(log_probs.gather(1, target[:, None]).double().sum())
    sums.correct += int(right.sum())
    sums.kl += float((teacher.exp() * (teacher - log_probs)).sum(-1).double().sum())
    sums.agree += int((choice == teacher.argmax(-1)).sum())
    confidence = top.exp().double().cpu()
    bin_of = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    for row, values in enumerate((torch.ones_like(confidence), confidence, right.double().cpu())):
        sums.bins[row].index_add_(0, bin_of, values)


def _figures(name: str, sums: _Sums, model: PreTrainedModel, subject: Subject) -> dict[str, float]:
    ce = sums.ce / sums.positions
    if not math.isfinite(ce):
        raise DataError(f"{name}: the held-out cross entropy is not finite")
    _, confidence, correct = sums.bins
    params = sum(p.numel() for p in model.parameters())
    figures: dict[str, float] = {
        "params": params,
        "active_params": active_parameters(model),
        "heldout_ce_nats": ce,
        "heldout_ppl": math.exp(ce),
        "top1_accuracy": sums.correct / sums.positions,
        "tokens_per_s": sums.positions / sums.seconds,
        "size_bytes": subject.size_bytes,
        "ece": float((confidence - correct).abs().sum()) / sums.positions,
    }
    if name != "teacher":
        figures |= {"kl_to_teacher_nats": sums.kl / sums.positions, "top1_agreement": sums.agree / sums.positions}
    return figures


def _ahead(model: PreTrainedModel, folder: Path, windows: torch.Tensor, micro_batch: int) -> dict[str, float]:
    """What the multi-token-prediction modules of `model`, if it has any, would save as its draft model."""
    mtp = load_mtp(model, folder)
    if mtp is None:
        return {}
    measured = [acceptance(model, mtp, part) for part in windows.split(micro_batch)]
    positions = sum(m.positions for m in measured)
    rates = [sum(m.positions * m.rates[k] for m in measured) / positions for k in range(mtp.depth)]
    named = {f"mtp_acceptance_{k}": rate for k, rate in enumerate(rates, 1)}
    return named | {"mtp_tokens_per_forward": Acceptance(positions, tuple(rates)).tokens_per_forward}


def gap_recovered(figures: dict[str, dict[str, float]]) -> float | None:
    """Share of the way from the baseline to the teacher that the student has come, in cross entropy; None without one."""
    if "baseline" not in figures:
        return None
    teacher, student, baseline = (figures[n]["heldout_ce_nats"] for n in ("teacher", "student", "baseline"))
    return (baseline - student) / (baseline - teacher) if baseline != teacher else None
