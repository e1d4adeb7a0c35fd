"""The corpus before it is tokenized: whether it is enough to be trained on and measured with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.checks.finding import Finding
from orchestrator.data.sample import BYTES_PER_TOKEN, Sample, count_tokens, too_small
from orchestrator.data.split import Sized, split
from orchestrator.plan.checkpoint import local_checkpoint
from orchestrator.plan.length import steps_of
from orchestrator.plan.make import Plan
from orchestrator.spec.data import Data, TrainTokenizer
from orchestrator.spec.job import Job
from orchestrator.spec.model import TransformersTeacher

COUNTED_BYTES = 512 << 10
"""Smaller corpora are tokenized here and now, which takes less than a second."""
MOST_BYTES_PER_TOKEN = 8.0
"""The proposed value must be valid for every tokenizer."""
MANY_PASSES = 4
"""Beyond, repeated text teaches little (Muennighoff et al. 2023, Scaling Data-Constrained Language Models)."""
FEW_WINDOWS = 8


def sample_findings(plan: Plan, sample: Sample) -> Iterator[Finding]:
    """Raise `DataError` if the corpus is too small for one training and one held-out window."""
    job = plan.job
    if sample.whole:
        yield from _heldout(job, sample)
    there = sample.rows(job.data.seq_len)
    read = steps_of(job.train, there) * job.train.global_batch
    if read > MANY_PASSES * there:
        train = job.train
        asked = (
            f"steps: {train.steps} steps of {train.global_batch} rows" if train.steps else f"epochs: {train.epochs:g} epochs"
        )
        yield Finding(
            f"train.{asked} read the corpus, about {there:,} windows, "
            f"about {read / there:,.0f} times; more than {MANY_PASSES} passes teach little"
        )


def _heldout(job: Job, sample: Sample) -> Iterator[Finding]:
    data, tokenizer = job.data, _tokenizer_folder(job)
    known = tokenizer is not None or isinstance(data.tokenizer, TrainTokenizer)
    if known and sample.size <= COUNTED_BYTES:
        documents = sample.sized(data.seed, count_tokens(data, sample, tokenizer))
        if _lacks_a_side(documents, data):
            raise too_small(data, documents)
    else:
        documents = sample.about(data.seed, BYTES_PER_TOKEN)
        if _lacks_a_side(sample.about(data.seed, 1.0), data):  # no tokenizer makes more tokens than there are bytes
            raise too_small(data, sample.about(data.seed, MOST_BYTES_PER_TOKEN))
    found = split(documents, data.heldout_fraction, data.seq_len)
    if found.heldout < FEW_WINDOWS:
        yield Finding(
            f"data.heldout_fraction: {data.heldout_fraction:g} keeps {found.heldout_documents} of {len(documents)} documents "
            f"for evaluation, about {found.heldout} windows: figures measured on so few are rough"
        )


def _tokenizer_folder(job: Job) -> Path | None:
    """Return the local folder of the teacher's tokenizer; None if it is not on this machine."""
    folder = local_checkpoint(job.teacher.path) if isinstance(job.teacher, TransformersTeacher) else None
    return folder if folder and (folder / "tokenizer.json").is_file() else None


def _lacks_a_side(documents: Sequence[Sized], data: Data) -> bool:
    found = split(documents, data.heldout_fraction, data.seq_len - 1)  # a BOS id may make up for the one that is missing
    return not found.heldout or not found.train
