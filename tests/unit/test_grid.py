"""The grid of a sweep: what it makes of its text, and that every point is looked at before anything starts."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from orchestrator.cli import main
from orchestrator.errors import DataError, ResumableError, SpecError
from orchestrator.plan.make import Plan
from orchestrator.sweep import grid, parse_grid, points, run_points
from tests.tiny import tiny_job, write_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tiny_job(tmp_path / "corpus", tmp_path / "store"))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("objective.alpha=0,0.1, 1e-3", [0, 0.1, 0.001]),
        ("train.precision=bf16,fp32", ["bf16", "fp32"]),
        ("labels.temperatures=[1.0],[1.0,2.0]", [[1.0], [1.0, 2.0]]),
        ("export.directory=null,/a/b", [None, "/a/b"]),
        ("data.source.paths=['a,b'],[c]", [["a,b"], ["c"]]),
        ("seed=0", [0]),
    ],
)
def test_values_are_yaml_with_commas_between_them(text: str, values: list[Any]) -> None:
    assert list(parse_grid([text]).values()) == [values]


def test_points_are_the_product_and_read_back_to_their_values() -> None:
    axes = {"a.b": [0, 0.5], "c": ["x", "true", "2", "p: q", "é"], "d": [[1, 2], None]}
    found = grid(axes)
    read = [tuple(YAML(typ="safe").load(text.partition("=")[2]) for text in point) for point in found]
    assert read == list(itertools.product(*axes.values()))
    assert {tuple(text.partition("=")[0] for text in point) for point in found} == {tuple(axes)}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["objective.alpha"], "expected KEY=a,b,c"),
        (["=1,2"], "expected KEY=a,b,c"),
        (["objective.alpha="], "none of them empty"),
        (["objective.alpha=0,,1"], "none of them empty"),
        (["objective.alpha=0,1,"], "none of them empty"),
        (["objective.alpha=[0,1"], "none of them empty"),
        (["objective.alpha=0,1", "objective.alpha=0.5"], "objective.alpha is given twice"),
        (["objective.alpha=0,0"], "given twice"),
        (["objective.alpha=1,1.0"], "one and the same run"),
        (["train.workers=1,2"], "one and the same run"),
        (["seed=0,1", "export.directory=/a/b"], "export.directory: several points would export to /a/b.*=null"),
        (["objective.alpha=0,2"], "objective.alpha: must be at most 1"),
        (["objective.alfa=0,1"], "unknown key, did you mean alpha"),
        (["train.global_batch=8,7", "train.steps=5"], "train"),
    ],
)
def test_a_bad_grid_is_one_line_that_names_it(job: Path, axes: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        points(job, parse_grid(axes))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_a_key_is_not_set_and_swept_at_once(job: Path) -> None:
    with pytest.raises(SpecError, match="leave one of them out"):
        points(job, {"objective.alpha": [0, 1]}, ["objective.alpha=0.5"])


def test_overrides_hold_for_every_point(job: Path) -> None:
    found = points(job, {"objective.alpha": [0, 1], "seed": [1, 2]}, ["train.steps=77"])
    jobs = [point.plan.job for point in found]
    assert [(j.objective.alpha, j.seed, j.train.steps) for j in jobs] == [(0, 1, 77), (0, 2, 77), (1, 1, 77), (1, 2, 77)]


def test_a_bad_last_point_stops_the_sweep_before_ray_is_loaded(job: Path) -> None:
    program = (
        "import sys; from orchestrator.api import sweep; from orchestrator.errors import SpecError\n"
        "try: sweep(sys.argv[1], {'objective.alpha': [0, 0.5, 7]})\n"
        "except SpecError: print('ray' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(job)], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    assert not (job.parent / "store").exists()


# A point that fails.


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> dict[float, Exception]:
    """Runs that end at once, with the error that stands here for their alpha, on no Ray; returns the errors to fill in."""
    errors: dict[float, Exception] = {}

    def run(plan: Plan) -> dict[str, Any]:
        alpha = plan.job.objective.alpha
        if alpha in errors:
            raise errors[alpha]
        return {"alpha": alpha}

    monkeypatch.setattr("orchestrator.pipeline.run", run)
    monkeypatch.setattr("orchestrator.runtime.session.ray_session", lambda *_: contextlib.nullcontext())
    return errors


def test_a_point_after_a_failed_one_has_a_fresh_ray(
    job: Path, stubbed: dict[float, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed run still trains would have the cores that the next one waits for."""
    story: list[str] = []

    @contextlib.contextmanager
    def session(*_: Any) -> Iterator[None]:
        if story.count("up") > story.count("down"):
            yield
            return
        story.append("up")
        yield
        story.append("down")

    def run(plan: Plan) -> dict[str, Any]:
        story.append(f"{plan.job.objective.alpha:g}")
        return own(plan)

    from orchestrator import pipeline

    own = pipeline.run
    monkeypatch.setattr("orchestrator.pipeline.run", run)
    monkeypatch.setattr("orchestrator.runtime.session.ray_session", session)
    stubbed[0.5] = ResumableError("worker lost")
    run_points(points(job, {"objective.alpha": [0, 0.25, 0.5, 0.75, 1]}))
    assert story == ["up", "0", "0.25", "0.5", "down", "up", "0.75", "1", "down"]


def test_a_point_that_fails_does_not_keep_the_others_from_running(
    job: Path, stubbed: dict[float, Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    stubbed |= {0.0: RuntimeError("wrapped"), 0.5: ResumableError("worker lost")}
    stubbed[0.0].__cause__ = DataError("corpus: no text")
    ended = run_points(points(job, {"objective.alpha": [0, 0.5, 1]}))
    assert [type(ran.error) for ran in ended] == [DataError, ResumableError, type(None)]
    assert [ran.report for ran in ended] == [None, None, {"alpha": 1.0}]
    assert [Path(ran.run).name for ran in ended] == ["tiny", "tiny-2", "tiny-3"]
    assert "tiny failed: corpus: no text" in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_first_failure(
    job: Path, stubbed: dict[float, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    stubbed |= {0.5: DataError("corpus: no text"), 1.0: ResumableError("worker lost")}
    monkeypatch.setattr(sys, "argv", ["distill", "sweep", str(job), "--grid", "objective.alpha=0,0.5,1"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == DataError.exit_code == 3


def test_a_fault_of_the_program_ends_the_sweep(job: Path, stubbed: dict[float, Exception]) -> None:
    stubbed[0.5] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        run_points(points(job, {"objective.alpha": [0, 0.5, 1]}))


def test_a_sweep_that_is_started_again_has_the_same_runs(job: Path, stubbed: dict[float, Exception]) -> None:
    """And one with a further point adds a run, whatever the order of its points."""
    names = [Path(ran.run).name for ran in run_points(points(job, {"objective.alpha": [0, 1]}))]
    assert [Path(ran.run).name for ran in run_points(points(job, {"objective.alpha": [0, 1]}))] == names
    assert [Path(ran.run).name for ran in run_points(points(job, {"objective.alpha": [0.5, 1, 0]}))] == ["tiny-3", *names[::-1]]


def test_a_run_that_has_finished_keeps_its_report(
    job: Path, stubbed: dict[float, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running it again would measure no speed, because everything would be reused."""
    first, second = run_points(points(job, {"objective.alpha": [0, 1]}))
    for ran, status in ((first, "finished"), (second, "failed")):
        Path(ran.run).mkdir(parents=True)
        (Path(ran.run) / "run.json").write_text(json.dumps({"status": status}))
        (Path(ran.run) / "report.json").write_text('{"kept": 1}')
    again = run_points(points(job, {"objective.alpha": [0, 1]}))
    assert [ran.report for ran in again] == [{"kept": 1}, {"alpha": 1.0}]
    monkeypatch.setattr("orchestrator.runtime.session.ray_session", None)
    assert run_points(points(job, {"objective.alpha": [0]}))[0].report == {"kept": 1}, "no Ray for what is done"
