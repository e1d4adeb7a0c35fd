"""Quality, agreement, calibration, speed and size of one model on held-out windows; the teacher's from what it has answered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from orchestrator.evaluate.answers import Answered, TeacherAnswers, Whole
from orchestrator.evaluate.bootstrap import Floats
from orchestrator.evaluate.figures import Sums, figures_of
from orchestrator.evaluate.samples import SAMPLE_TOKENS, SampleToken, sample_rows, sample_text
from orchestrator.evaluate.tokens import TeacherComparison
from orchestrator.evaluate.windows import Heldout
from orchestrator.labels.answer import Answer
from orchestrator.models.build import load_model, outline
from orchestrator.models.continuations import chosen_prompts, continuations
from orchestrator.models.head import last_hidden, output_head
from orchestrator.models.hub import weight_files
from orchestrator.models.speculate import measured_drafts
from orchestrator.models.speed import tokens_per_s
from orchestrator.plan.memory import head_rows
from orchestrator.store.files import local_folder
from orchestrator.store.heldout import DRAFTS, SPEED

Tensor = torch.Tensor


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    address: str
    """The address of its folder."""
    dtype: Literal["bf16", "fp32", "fp8"]
    """The number format it was trained in; fp8 is measured as the bf16 that it is saved in."""

    @property
    def folder(self) -> Path:
        """The folder on this node."""
        return local_folder(self.address)

    @property
    def size_bytes(self) -> int:
        """Bytes of the model's weights, without multi-token-prediction modules beside it."""
        return sum(file.stat().st_size for file in weight_files(self.folder))


@dataclass(frozen=True)
class AnsweringTeacher:
    """The teacher, as far as it takes one to read its answers."""

    address: str
    """The address of its folder."""
    dtype: Literal["bf16", "fp32"]
    vocab_size: int

    def answers(self, heldout: Heldout, on: torch.device) -> TeacherAnswers:
        """Return the teacher's answers on the windows of `heldout`."""
        return TeacherAnswers(heldout, self.address, self.dtype, self.vocab_size, on)


@dataclass(frozen=True)
class Result:
    """The measurements of one model."""

    figures: dict[str, float]
    """Figures as report.json has them; KL and agreement are against the teacher."""
    nats: Floats
    """[windows]: sums of cross entropy over their targets."""
    entropy: Floats | None = None
    """[positions]: of what the teacher says; None for another model."""
    comparison: TeacherComparison | None = None
    """None without a teacher."""
    samples: tuple[list[SampleToken], ...] = ()
    """Windows token by token, beside the teacher."""
    texts: list[str] | None = None
    """The model's continuations of the report's prompts; None if it could not produce them."""
    failure: str = ""
    """Why it could not."""


@torch.inference_mode()
def measure_teacher(heldout: Heldout, teacher: AnsweringTeacher, micro_batch: int, on: torch.device) -> Result:
    """Measure the teacher by its answers.

    Raises `IntegrityError` where they are missing or damaged, and `DataError` if its cross entropy is not finite.
    """
    sums, entropy = Sums(), list[Tensor]()
    for part in _parts(heldout, teacher.answers(heldout, on), micro_batch):
        assert part.answered
        for chosen in part.chunks(head_rows(teacher.vocab_size, on.type == "cuda")):
            said = part.answered.at(chosen, on)
            sums.add(said, part.targets(chosen).to(on))
            entropy.append(said.entropy().double().cpu())
    subject = Subject(teacher.address, teacher.dtype)
    figures = figures_of("teacher", sums, outline(subject.folder), subject.size_bytes) | (heldout.kept(DRAFTS) or {})
    speed = heldout.kept(SPEED)
    if speed is not None:
        figures["tokens_per_s"] = speed["tokens_per_s"]
    return Result(figures, sums.nats_by_window(heldout.targets()), torch.cat(entropy).numpy())


@torch.inference_mode()
def measure_model(
    name: str, subject: Subject, heldout: Heldout, teacher: AnsweringTeacher | None, micro_batch: int, on: torch.device
) -> Result:
    """Load and measure the model `name`, `micro_batch` windows at a time; compare it with the answers of `teacher`, if given.

    Its speed is taken as the teacher's was, with as many rows in a pass and as many threads. Raises `IntegrityError` where the
    answers are missing or damaged, and `DataError` if the model's cross entropy is not finite.
    """
    model = load_model(subject.folder, subject.dtype, on)
    head, sums, samples = output_head(model), Sums(), list[list[SampleToken]]()
    tokenizer = Tokenizer.from_file(str(heldout.tokenizer / "tokenizer.json"))
    shown = sample_rows(len(heldout.targets()))
    for part in _parts(heldout, teacher.answers(heldout, on) if teacher else None, micro_batch):
        states = last_hidden(model, part.ids[:, :-1].to(on))
        for chosen in part.chunks(head_rows(head.vocab_size, on.type == "cuda")):
            log_probs = head(states[chosen.to(on)]).log_softmax(-1)
            sums.add(Whole(log_probs), part.targets(chosen).to(on))
            if part.answered:
                sums.compare(part.answered.at(chosen, on), log_probs)
        for chosen in part.beginnings(shown) if part.answered else ():
            assert part.answered
            log_probs = head(states[chosen.to(on)]).log_softmax(-1)
            samples.append(sample_text(part.answered.at(chosen, on), log_probs, part.targets(chosen).to(on), tokenizer))
    windows, kept = _windows(heldout)
    figures = figures_of(name, sums, outline(subject.folder), subject.size_bytes)
    figures |= measured_drafts(model, subject.folder, windows, micro_batch)
    teachers = (heldout.kept(SPEED) if teacher else None) or {"rows": micro_batch, "threads": torch.get_num_threads()}
    figures["tokens_per_s"] = _speed(model, windows[: teachers["rows"], :-1], teachers["threads"])
    # Last of all: what fails in it may leave no working device behind.
    texts, failure = None, ""
    try:
        texts = continuations(model, chosen_prompts(windows, kept), heldout.tokenizer)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    nats = sums.nats_by_window(heldout.targets())
    return Result(figures, nats, None, sums.comparison, tuple(samples), texts, failure)


@dataclass(frozen=True)
class _Part:
    """A few windows, and what the teacher said on them."""

    first: int
    """The number of the first of them."""
    ids: Tensor
    """[rows, seq + 1], int64"""
    kept: Tensor
    """[rows, seq], bool: which targets count."""
    answered: Answered | None

    def chunks(self, positions: int) -> Iterator[Tensor]:
        """Masks [rows, seq], each of at most `positions` of the targets that count, in their order."""
        for some in self.kept.flatten().nonzero()[:, 0].split(positions):
            chosen = torch.zeros_like(self.kept)
            chosen.view(-1)[some] = True
            yield chosen

    def beginnings(self, windows: set[int]) -> Iterator[Tensor]:
        """Masks [rows, seq], each of the first `SAMPLE_TOKENS` targets of one of those `windows` that are here."""
        for window in sorted(windows & set(range(self.first, self.first + len(self.ids)))):
            chosen = torch.zeros_like(self.kept)
            chosen[window - self.first, :SAMPLE_TOKENS] = True
            yield chosen

    def targets(self, chosen: Tensor) -> Tensor:
        """The ids that follow where `chosen` [rows, seq] is true."""
        return self.ids[:, 1:][chosen]


def _parts(heldout: Heldout, answers: TeacherAnswers | None, micro_batch: int) -> Iterator[_Part]:
    """All windows in their order, `micro_batch` at a time or fewer."""
    first = 0
    for shard, tokens in heldout.shards():
        answered = answers.read(shard, tokens) if answers else None
        ids, kept = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.counted())
        for start in range(0, len(ids), micro_batch):
            rows = slice(start, start + micro_batch)
            yield _Part(first + start, ids[rows], kept[rows], answered.rows(rows) if answered else None)
        first += len(ids)


def _windows(heldout: Heldout) -> tuple[Tensor, Tensor]:
    """All windows [rows, seq + 1], and which of their targets count [rows, seq]."""
    rows = heldout.rows()
    return torch.from_numpy(rows.ids).long(), torch.from_numpy(rows.counted())


def _speed(model: PreTrainedModel, ids: Tensor, threads: int) -> float:
    """Tokens per second of `model` on `ids` [rows, seq] with so many threads."""
    head, own = output_head(model), torch.get_num_threads()

    def answers(ids: Tensor) -> Answer:
        return Answer(last_hidden(model, ids.to(model.device)), head, head.vocab_size)

    torch.set_num_threads(threads)
    try:
        return tokens_per_s(answers, ids)
    finally:
        torch.set_num_threads(own)
