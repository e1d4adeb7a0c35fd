"""A sweep: one job run at every point of a grid, one run after another on one Ray.

A point is the job with a few overrides, and so a run like any other: what its runs have in common (tokens, teacher, labels) is
made once, because the storage finds it again by its content, and a sweep that broke off is continued by starting it again.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DistillError, SpecError, find_user_error
from orchestrator.plan.make import Plan, make_plan
from orchestrator.run.directory import RUN, RunDirectory, claim_directory, identity_of
from orchestrator.spec.load import load_job
from orchestrator.spec.reader import Reader, clip
from orchestrator.store.files import Store, open_store

_AXIS = re.compile(r"([\w-]+(?:\.[\w-]+)*)=(.*)", re.ASCII | re.DOTALL)
_PLAIN = re.compile(r"[\w./-]+")


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    overrides: tuple[str, ...]
    """Settings that the point adds to the job, as `KEY=VALUE`."""
    plan: Plan

    def __str__(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Ran:
    """The outcome of a point."""

    point: Point
    run: str
    """Address of its run directory."""
    report: dict[str, Any] | None
    error: DistillError | None
    """Why there is no report."""


def parse_grid(axes: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each key, from texts `KEY=a,b,c` whose values are YAML.

    Raises `SpecError` for a text that is not of that form, or a key that is given twice.
    """
    parsed: dict[str, list[Any]] = {}
    for text in axes:
        label = f"--grid {clip(text, 80)}"
        match = _AXIS.fullmatch(text)
        if not match:
            raise SpecError(f"{label}: expected KEY=a,b,c with a dotted key, such as objective.alpha=0,0.1,1")
        key, listed = match[1], match[2].strip()
        if key in parsed:
            raise SpecError(f"{label}: {key} is given twice; put all its values into one --grid {key}=a,b,c")
        parsed[key] = _values(key, listed, label)
    return parsed


def _values(key: str, listed: str, label: str) -> list[Any]:
    try:
        values: Any = Reader(f"[{listed}]", label, lines=False).read()
    except SpecError:
        values = None
    if not isinstance(values, list) or not values or listed.endswith(",") or "" in values:
        raise SpecError(f"{label}: expected values with commas between them and none of them empty, such as {key}=1,2")
    return values


def grid(axes: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    """The overrides (`KEY=VALUE`) of every point of the product of `axes`, values by key; the last key varies fastest.

    Raises `SpecError` for a value that is given twice.
    """
    written = [[f"{key}={_written(value)}" for value in values] for key, values in axes.items()]
    twice = next((item for items in written for i, item in enumerate(items) if item in items[:i]), None)
    if twice is not None:
        raise SpecError(f"--grid {twice}: this value is given twice; give each value once")
    return list(itertools.product(*written))


def _written(value: Any) -> str:
    """`value` as YAML on one line; text without quotes where it stays text without them."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and Reader(value, "").read() == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def points(job: str | Path, axes: Mapping[str, Sequence[Any]], overrides: Sequence[str] = ()) -> list[Point]:
    """Every point of the grid `axes` with its plan; nothing is started.

    Raises `SpecError` for the first point that cannot be run, and for two points that would be the same run or export to the
    same place.
    """
    given = {override.partition("=")[0] for override in overrides}
    for key in given & axes.keys():
        raise SpecError(f"--grid {key}: --set gives {key} too; leave one of them out")
    found = [Point(own, make_plan(load_job(job, [*overrides, *own]))) for own in grid(axes)]
    seen: dict[tuple[str, ...], Point] = {}
    for point in found:
        spec = point.plan.job
        same = seen.setdefault((spec.storage, spec.name, identity_of(spec)), point)
        if same is not point:
            raise SpecError(f"--grid: {same} and {point} are one and the same run; sweep a key that changes its result")
        target = spec.export.directory
        if target is not None and any(target == other.plan.job.export.directory for other in found if other is not point):
            raise SpecError(
                f"export.directory: several points would export to {clip(target, 120)}, each over the one before; with "
                "--set export.directory=null every run keeps its own export"
            )
    return found


def run_points(grid_points: Sequence[Point]) -> list[Ran]:
    """Run `grid_points` one after another, or continue them; a point whose run has finished keeps its report as it is.

    A point that fails with a user's error does not keep the others from running; any other error ends the sweep. What a failed
    run left behind on Ray ends before the next one begins.
    """
    from orchestrator.runtime.session import ray_session

    slots = max(point.plan.cpu_slots for point in grid_points)
    ended: list[Ran] = []
    with ExitStack() as ray:
        for number, point in enumerate(grid_points, 1):
            store = open_store(point.plan.storage)
            store.check_writable()
            directory = claim_directory(store, point.plan.job)
            report, error = _report_of(store, directory), None
            _say(f"sweep {number}/{len(grid_points)}  {directory.run}  {point}" + ("  finished before" if report else ""))
            if report is None:
                ray.enter_context(ray_session(grid_points[0].plan.job.cluster, slots))  # keeps one that is up
                report, error = _attempt(point)
            if error is not None:
                ray.close()  # its training may still go on, and would have the cores that the next point needs
                _say(f"{directory.run} failed: {error}")
            ended.append(Ran(point, store.address(directory.key), report, error))
    return ended


def _report_of(store: Store, directory: RunDirectory) -> dict[str, Any] | None:
    """The report of a run that has finished; None for any other. To run it once more would lose what it measured of speed."""
    record = store.read_json(f"{directory.key}/{RUN}") or {}
    return store.read_json(f"{directory.key}/report.json") if record.get("status") == "finished" else None


def _attempt(point: Point) -> tuple[dict[str, Any] | None, DistillError | None]:
    """The report of `point`, or the user's error that it failed with."""
    from orchestrator.pipeline import run

    try:
        return run(point.plan), None
    except Exception as raised:
        error = find_user_error(raised)
        if error is None:
            raise
        return None, error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
