"""Everything that a look can find before it costs time: the one list that `plan`, `doctor` and `run` go through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from orchestrator.checks.corpus import sample_findings
from orchestrator.checks.finding import Finding, gathered
from orchestrator.checks.machine import machine_findings
from orchestrator.checks.models import MODEL_CHECKS, strange_ids
from orchestrator.data.sample import Sample, read_sample
from orchestrator.errors import DistillError
from orchestrator.plan.length import steps_of
from orchestrator.plan.make import Plan
from orchestrator.runtime.machine import this_machine
from orchestrator.spec.job import Job


@dataclass(frozen=True)
class Checked:
    """The findings about a job, and the sample of its corpus that was read for them."""

    findings: tuple[Finding, ...]
    sample: Sample | None
    """None for a corpus that cannot be read, or not without fetching it."""

    @property
    def warnings(self) -> list[str]:
        return [finding.text for finding in self.findings if finding.refusal is None]

    def refuse(self) -> None:
        """Raise the first finding that a run would end with."""
        refuse_first(self.findings)


def check(plan: Plan) -> Checked:
    """Look at models, corpus and machine; starts no Ray, imports no torch, fetches nothing."""
    sample, of_corpus = _corpus(plan)
    findings = [*check_models(plan.job), *of_corpus]
    if plan.job.cluster.address == "local":
        findings += gathered(lambda: machine_findings(plan, this_machine()))
    return Checked(tuple(sorted(findings, key=lambda finding: finding.refusal is None)), sample)


def _corpus(plan: Plan) -> tuple[Sample | None, list[Finding]]:
    try:
        sample = read_sample(plan.job.data)
    except DistillError as error:
        return None, [Finding(str(error), type(error))]
    if sample is None:
        return None, []
    looks = (lambda: strange_ids(plan.job, sample.texts), lambda: sample_findings(plan, sample))
    return sample, [finding for look in looks for finding in gathered(look)]


def check_models(job: Job) -> Iterator[Finding]:
    """Yield the findings that do not depend on the machine that the job runs on."""
    for look in MODEL_CHECKS:
        yield from gathered(partial(look, job))


def refuse_first(findings: Iterable[Finding]) -> None:
    """Raise the first of `findings` that a run would end with."""
    for finding in findings:
        if finding.refusal is not None:
            raise finding.refusal(finding.text)


def explain_checked(plan: Plan, checked: Checked) -> list[str]:
    """Lines for a person: how much data there is, and what was found."""
    lines: list[str] = []
    if checked.sample is not None:
        rows, about = checked.sample.rows(plan.job.data.seq_len), "" if checked.sample.whole else "more than "
        documents = f"{about}{len(checked.sample.documents):,} documents"
        read = steps_of(plan.job.train, rows) * plan.job.train.global_batch
        lines.append(f"data: {documents}, about {rows:,} windows; {read:,} rows are about {read / rows:.2g} passes")
    return lines + [finding.line for finding in checked.findings]
