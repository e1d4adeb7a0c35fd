"""Comparison of a set of runs: how their jobs differ, which runs are repetitions over seeds, and which group is best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from orchestrator.compare.figures import BY_NAME, Figure
from orchestrator.compare.read import RunRecord

ABSENT = "–"
"""Stands for a key that a job does not have."""
_NO_DIFFERENCE = ("name", "storage")
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """The mean of `n` runs; `half` is half of its 95 % t interval, None for a single run."""

    mean: float
    half: float | None
    n: int

    @property
    def ends(self) -> tuple[float, float]:
        """Both the mean itself for a single run."""
        half = self.half or 0.0
        return self.mean - half, self.mean + half


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of `values`, which are taken as independent and normal."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, n)
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(mean, quantile * statistics.stdev(values) / n**0.5, n)


@dataclass(frozen=True)
class Group:
    """Runs whose jobs are equal but for seed, name, and what changes no result."""

    runs: tuple[RunRecord, ...]
    values: dict[str, Any]
    """The group's values of the keys in which groups differ."""
    label: str

    def figure(self, name: str) -> Interval | None:
        """The interval of a figure over the seeds that have it; None if none has."""
        values = list(self.by_seed(name).values())
        return interval(values) if values else None

    def by_seed(self, name: str) -> dict[Any, float]:
        """The values of a figure by seed: the newest run's, for several runs of a seed are one draw."""
        return {run.seed: run.figures[name] for run in sorted(self.runs, key=attrgetter("started_s")) if name in run.figures}


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other."""

    runs: tuple[RunRecord, ...]
    differs: dict[str, list[Any]]
    """By key in which the jobs differ: each run's value, `ABSENT` where its job has no such key."""
    groups: tuple[Group, ...]
    cautions: tuple[str, ...]
    """Why some figures must not be compared, in sentences."""
    incomparable: frozenset[str]
    """Kinds of figures (`Figure.on`) that say nothing across these runs."""

    @property
    def repeated(self) -> bool:
        """Return whether some group has several runs."""
        return len(self.groups) < len(self.runs)

    def group_of(self, run: RunRecord) -> Group:
        return next(group for group in self.groups if run in group.runs)

    def best_runs(self, figure: Figure) -> set[str]:
        """Names of the runs that are best by `figure`; none where all are equal, seeds of one job, or cannot be compared."""
        if len(self.groups) == 1:
            return set()
        values = {run.name: run.figures[figure.name] for run in self.runs if figure.name in run.figures}
        return self._best(figure, values)

    def best_groups(self, figure: Figure) -> set[str]:
        """Labels of the groups whose mean is best."""
        means = {g.label: found.mean for g in self.groups if (found := g.figure(figure.name)) is not None}
        return self._best(figure, means)

    def _best(self, figure: Figure, values: Mapping[str, float]) -> set[str]:
        if figure.better is None or figure.on in self.incomparable or len(set(values.values())) < 2:
            return set()
        best = (min if figure.better == "lower" else max)(values.values())
        return {name for name, value in values.items() if value == best}


def compared(runs: Sequence[RunRecord]) -> Comparison:
    """`runs` beside each other, groups in the order of their first runs."""
    differs = differences([run.job for run in runs])
    groups = grouped(runs)
    incomparable, cautions = _cautions(runs, groups)
    return Comparison(tuple(runs), differs, groups, cautions, incomparable)


def differences(jobs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys in which `jobs` differ, in the order of the job file, each with every job's value."""
    keys = dict.fromkeys(key for job in jobs for key in job if key not in _NO_DIFFERENCE)
    found = {key: [job.get(key, ABSENT) for job in jobs] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def grouped(runs: Sequence[RunRecord]) -> tuple[Group, ...]:
    """`runs` by what can change a result, but for the seed."""
    members: list[list[RunRecord]] = []
    for run in runs:
        same = next((group for group in members if group[0].result == run.result), None)
        if same is None:
            members.append([run])
        else:
            same.append(run)
    differs = differences([group[0].result for group in members])
    values = [{key: column[i] for key, column in differs.items()} for i in range(len(members))]
    labels = [described(own) if 0 < len(own) <= 2 else group[0].name for own, group in zip(values, members, strict=True)]
    unique = [label if labels.count(label) == 1 else group[0].name for label, group in zip(labels, members, strict=True)]
    return tuple(Group(tuple(group), own, label) for group, own, label in zip(members, values, unique, strict=True))


def described(values: Mapping[str, Any]) -> str:
    """`values` in a few words: the last part of each key, and its value."""
    return ", ".join(f"{key.rpartition('.')[2]} {shown_value(value)}" for key, value in values.items())


def shown_value(value: Any) -> str:
    """A value of a job as YAML would write it, but for text without quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(shown_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def difference(better: Group, other: Group, figure: str) -> Interval | None:
    """`better` minus `other`, paired by seed; None where fewer than two seeds are in both.

    Two runs of one seed share first weights and order of training, so their difference varies less than they do.
    """
    ours, theirs = better.by_seed(figure), other.by_seed(figure)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return interval(pairs) if len(pairs) >= 2 else None


def finding(comparison: Comparison) -> str:
    """Describe the result of the comparison in one sentence that claims no more than was measured."""
    ce = BY_NAME["heldout_ce_nats"]
    measured = [(found, group) for group in comparison.groups if (found := group.figure(ce.name)) is not None]
    ranked = sorted(measured, key=lambda pair: pair[0].mean)
    runs = sum(ce.name in run.figures for run in comparison.runs)
    if len(ranked) < 2 and runs < len(comparison.runs):
        return f"{runs} of {len(comparison.runs)} runs have a held-out cross entropy so far: there is nothing to compare yet."
    if ce.on in comparison.incomparable:
        return "These runs were measured on different held-out rows, so none can be called the best."
    if len(ranked) == 1:
        return _of_one_job(ranked[0][0])
    (best, first), (next_best, second) = ranked[:2]
    if best.mean == next_best.mean:
        return f"No job stands out: {first.label} and {second.label} have the same held-out cross entropy."
    start = f"{first.label} has the lowest held-out cross entropy"
    paired = difference(first, second, ce.name)
    if paired is None or paired.half is None:
        return f"{start}, {next_best.mean - best.mean:.4f} nats per token below {second.label}."
    if paired.mean >= 0:
        return f"{start} on average, but not over the {paired.n} seeds that {second.label} has too."
    by = f"{-paired.mean:.4f} ± {paired.half:.4f} nats per token below {second.label} over {paired.n} seeds"
    return f"{start}, {by}{'' if paired.ends[1] < 0 else ': that may be chance'}."


def _of_one_job(found: Interval) -> str:
    if found.half is None:
        return f"One run: held-out cross entropy {found.mean:.4f} nats per token."
    return f"{found.n} runs of one job: held-out cross entropy {found.mean:.4f} ± {found.half:.4f} nats per token (95 %)."


def _cautions(runs: Sequence[RunRecord], groups: Sequence[Group]) -> tuple[frozenset[str], tuple[str, ...]]:
    rows = {run.heldout for run in runs if run.figures and run.heldout is not None}
    teachers = {str({k: v for k, v in run.result.items() if k.startswith("teacher.")}) for run in runs if run.figures}
    kinds: set[str] = set()
    said: list[str] = []
    if len(rows) > 1:
        kinds |= {"heldout", "teacher"}
        said.append(
            "The runs were not measured on the same held-out rows (the data, evaluate.rows or evaluate.every differ), so their "
            "quality figures cannot be compared and no best is marked among them."
        )
    if len(teachers) > 1:
        kinds.add("teacher")
        said.append("The runs have different teachers: KL, agreement and gap recovered are each about the run's own.")
    unfinished = [run.name for run in runs if not run.finished]
    if unfinished:
        said.append(f"Not finished: {', '.join(unfinished)}. What is there so far is shown.")
    for group in groups:
        for seed in dict.fromkeys(run.seed for run in group.runs):
            same = sorted((run for run in group.runs if run.seed == seed), key=attrgetter("started_s"))
            if len(same) > 1:
                names = ", ".join(run.name for run in same)
                said.append(f"{names} are one job with one seed: of each figure, the newest value alone counts in means.")
    if len(groups) == len(runs):
        said.append("One run of each job: small differences may be chance. More seeds: distill sweep JOB --grid seed=0,1,2.")
    return frozenset(kinds), tuple(said)
