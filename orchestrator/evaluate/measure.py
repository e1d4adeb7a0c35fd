"""Quality, agreement, calibration, speed and size of models on the same held-out windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import ray
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from orchestrator.errors import DataError
from orchestrator.evaluate.bootstrap import Intervals, intervals
from orchestrator.evaluate.generate import Continuations, continued
from orchestrator.evaluate.samples import Answers, SampleToken, sample_text
from orchestrator.evaluate.speculate import Acceptance, acceptance
from orchestrator.evaluate.tokens import Against, by_token
from orchestrator.labels.answer import Answer
from orchestrator.models.build import device, load_model, outline
from orchestrator.models.head import last_hidden, output_head
from orchestrator.models.hub import weight_files
from orchestrator.models.mtp import load_mtp
from orchestrator.models.router import active_parameters
from orchestrator.plan.memory import head_rows
from orchestrator.runtime.environment import limit_threads
from orchestrator.store.files import Store, local_folder
from orchestrator.store.heldout import measured_rows
from orchestrator.store.records import TokenManifest

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
        return sum(file.stat().st_size for file in weight_files(self.folder))


@dataclass(frozen=True)
class Measured:
    """Teacher, student and perhaps baseline on the same held-out windows."""

    figures: dict[str, dict[str, float]]
    """By model, as report.json has them; KL and agreement are against the teacher."""
    by_token: dict[str, Any]
    """What report.json says under `heldout`."""
    samples: list[list[SampleToken]]
    generated: Continuations
    """Without a teacher that no process holds alone."""
    intervals: Intervals | None


@dataclass
class _Sums:
    """Totals over all positions of one model, and single numbers by position."""

    positions: int = 0
    correct: int = 0
    seconds: float = 0.0
    ce: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agree: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bins = torch.zeros(3, ECE_BINS, dtype=torch.float64)
        """Per confidence bin: count, confidence, correct."""


class Windows(NamedTuple):
    """Held-out windows."""

    ids: torch.Tensor
    """[rows, seq + 1], int64"""
    kept: torch.Tensor
    """[rows, seq], bool: which targets count."""
    documents: Sequence[bytes]
    """[rows]: the document that each belongs to."""


@dataclass(frozen=True)
class Heldout:
    """Windows that no training has seen, at most `rows` of them."""

    store: Store
    data_folder: str
    manifest: TokenManifest
    rows: int
    watched: int = 0
    """Rows that training was evaluated on; others are taken where there are enough."""

    def windows(self) -> Windows:
        """Evenly from as many shards as `rows` allows."""
        tokens = measured_rows(self.store, self.data_folder, self.manifest, self.rows, self.watched)
        assert tokens.documents is not None
        return Windows(torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.counted()), tokens.documents)


@dataclass(frozen=True)
class Spread:
    """A teacher that no process holds alone, but the one that measures can lead."""

    load: Callable[[], Answers]
    options: Mapping[str, Any]
    """Ray's, for the actor that is to lead it."""


def measure(heldout: Heldout, subjects: dict[str, Subject], micro_batch: int, cpus: int, spread: Spread | None) -> Measured:
    """Measure `subjects`, by name, among them `teacher` and `student`; the teacher answers itself if it is `spread`.

    Raises `DataError` if a model's loss on the held-out windows is not finite.
    """
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    options: Mapping[str, Any] = spread.options if spread else {"num_cpus": cpus, "num_gpus": gpus}
    actor: Any = _Measurer.options(**options).remote()
    threads = max(1, int(options["num_cpus"]))
    return ray.get(actor.measure.remote(heldout, subjects, micro_batch, threads, options["num_gpus"], spread))


@ray.remote(max_restarts=3, max_task_retries=3)
class _Measurer:
    """An actor, as whoever leads others must be."""

    def measure(
        self, heldout: Heldout, subjects: dict[str, Subject], micro_batch: int, threads: int, gpus: float, spread: Spread | None
    ) -> Measured:
        limit_threads(threads)
        torch.set_num_threads(threads)
        on = device(gpus)
        here = {n: load_model(s.folder, s.dtype, on) for n, s in subjects.items() if n != "teacher" or spread is None}
        speakers = {name: _answers(model) for name, model in here.items()} | ({"teacher": spread.load()} if spread else {})
        return _measured(heldout, subjects, micro_batch, here, dict(sorted(speakers.items(), key=lambda s: s[0] != "teacher")))


def _answers(model: PreTrainedModel) -> Answers:
    head = output_head(model)
    return lambda ids: Answer(last_hidden(model, ids.to(model.device)), head, head.vocab_size)


def _measured(
    heldout: Heldout,
    subjects: dict[str, Subject],
    micro_batch: int,
    models: dict[str, PreTrainedModel],
    speakers: dict[str, Answers],
) -> Measured:
    """What `speakers`, the teacher first, say, and what `models`, those of them that are in this process, are."""
    on = models["student"].device
    windows, kept, documents = heldout.windows()
    windows, kept, targets = windows.to(on), kept.to(on), kept.sum(1)
    sums = {name: _Sums() for name in speakers}
    entropy: list[torch.Tensor] = []
    for answers in speakers.values():  # first calls build caches; they would distort the speed of whoever comes first
        answers(windows[:1, :-1])
    for part, counted in zip(windows.split(micro_batch), kept.split(micro_batch), strict=True):
        entropy += _measure_part(speakers, sums, part, counted.flatten())
    figures = {name: _figures(name, sums[name], outline(subject.folder), subject) for name, subject in subjects.items()}
    for name, model in models.items():
        figures[name] |= _ahead(model, subjects[name].folder, windows, micro_batch)
    against = {
        name: Against(torch.cat(sums[name].kl).numpy(), torch.cat(sums[name].agree).numpy())
        for name in subjects
        if name != "teacher"
    }
    tokenizer = Tokenizer.from_file(str(subjects["teacher"].folder / "tokenizer.json"))
    samples = sample_text(speakers["teacher"], speakers["student"], windows, tokenizer)
    nats = {name: _by_window(torch.cat(s.ce), targets) for name, s in sums.items()}
    found = intervals(nats, targets.numpy(), documents)
    # Last of all: what fails in it may leave no working device behind.
    generated = continued(models, windows, kept, subjects["teacher"].folder)
    return Measured(figures, by_token(torch.cat(entropy).numpy(), against), samples, generated, found)


def _by_window(values: torch.Tensor, targets: torch.Tensor) -> npt.NDArray[np.float64]:
    """Sums [windows] of `values` [positions] that stand window after window, `targets` [windows] of each."""
    return np.add.reduceat(values.numpy(), (targets.cumsum(0) - targets).numpy())


@torch.inference_mode()
def _measure_part(
    speakers: dict[str, Answers], sums: dict[str, _Sums], windows: torch.Tensor, kept: torch.Tensor
) -> list[torch.Tensor]:
    """Add what every model, the teacher first, says about the targets of `windows` [rows, seq + 1] that are `kept`
    [rows * seq], a chunk of them at a time.

    Returns the entropy of what the teacher says, [targets] in chunks.
    """
    said: dict[str, Answer] = {}
    for name, answers in speakers.items():
        started = time.perf_counter()
        answer = answers(windows[:, :-1])
        said[name] = replace(answer, states=answer.states.flatten(0, 1)[kept])
        sums[name].seconds += time.perf_counter() - started
    chunk = head_rows(said["teacher"].vocab_size, windows.is_cuda)
    entropy: list[torch.Tensor] = []
    for start, target in enumerate(windows[:, 1:].flatten()[kept].split(chunk)):
        states = slice(start * chunk, start * chunk + len(target))
        teacher = torch.empty(0)
        for name, answer in said.items():
            started = time.perf_counter()
            log_probs = answer.head(answer.states[states]).log_softmax(-1)
            sums[name].seconds += time.perf_counter() - started
            _accumulate(sums[name], log_probs, target)
            if name == "teacher":
                teacher = log_probs
                entropy.append(torch.special.entr(teacher.exp()).sum(-1).double().cpu())
            else:
                sums[name].kl.append((teacher.exp() * (teacher - log_probs)).sum(-1).double().cpu())
                sums[name].agree.append((log_probs.argmax(-1) == teacher.argmax(-1)).cpu())
    return entropy


def _accumulate(sums: _Sums, log_probs: torch.Tensor, target: torch.Tensor) -> None:
    top, choice = log_probs.max(-1)
    right = choice == target
    sums.positions += len(target)
    sums.ce.append(-log_probs.gather(1, target[:, None])[:, 0].double().cpu())
    sums.correct += int(right.sum())
    confidence = top.exp().double().cpu()
    bin_of = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    for row, values in enumerate((torch.ones_like(confidence), confidence, right.double().cpu())):
        sums.bins[row].index_add_(0, bin_of, values)


def _figures(name: str, sums: _Sums, model: PreTrainedModel, subject: Subject) -> dict[str, float]:
    ce = float(torch.cat(sums.ce).mean())
    if not math.isfinite(ce):
        raise DataError(f"{name}: the held-out cross entropy is not finite")
    _, confidence, correct = sums.bins
    params = sum(p.numel() for p in model.parameters())
    figures: dict[str, float] = {
        "params": params,
        "active_params": active_parameters(model),
        "heldout_ce_nats": ce,
        "heldout_ppl": perplexity(ce),
        "top1_accuracy": sums.correct / sums.positions,
        "tokens_per_s": sums.positions / sums.seconds,
        "size_bytes": subject.size_bytes,
        "ece": float((confidence - correct).abs().sum()) / sums.positions,
    }
    if name != "teacher":
        figures["kl_to_teacher_nats"] = float(torch.cat(sums.kl).mean())
        figures["top1_agreement"] = float(torch.cat(sums.agree).double().mean())
    return figures


def perplexity(ce: float) -> float:
    """exp(ce), infinite where a float cannot hold it: of a broken model whose cross entropy is still finite."""
    try:
        return math.exp(ce)
    except OverflowError:
        return math.inf


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
