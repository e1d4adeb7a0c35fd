"""What a user is told of an error that came by way of Ray, and how much a run says."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.display import Display
from orchestrator.errors import DataError, find_user_error
from tests.tiny import eventually

SAID = "rows.jsonl at byte 7: 'text' is null; take such rows out"


def annotated(error: Exception) -> Exception:
    """As Ray Data hands it on: with advice of its own in the arguments, pickled, and as the cause of a wrapper."""
    from ray.data._internal.util import _annotate_exception_with_retry_context as annotate

    counts = {"attempts": 1, "max_attempts": 1, "total_backoff_s": 0.0, "exception_str": str(error)}
    return pickle.loads(pickle.dumps(annotate(error, description="apply UDF transform", **counts)))


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_an_error_keeps_its_own_words_on_the_way_through_ray(layers: int) -> None:
    """A row without text: Ray's text on retries stood at the end of every error of data, labels and disk."""
    from ray.exceptions import RayTaskError

    error = annotated(DataError(SAID))
    assert "UDF" in error.args[0], "the control: Ray has written into it"
    for _ in range(layers):
        error = RayTaskError("f", "Traceback of a worker", error, "title", 1, "127.0.0.1").as_instanceof_cause()
    found = find_user_error(error)
    assert isinstance(found, DataError) and str(found) == SAID


def test_a_wrapper_of_another_class_is_opened() -> None:
    from ray.exceptions import RayTaskError

    assert str(find_user_error(RayTaskError("f", "Traceback", DataError(SAID), "title", 1, "127.0.0.1"))) == SAID
    assert find_user_error(ValueError("a bug")) is None


CORE = """
import os, sys
from orchestrator.runtime.noise import stdout_for_data
with stdout_for_data():
    os.write(2, b"[E] core_worker.cc:1: Actor A has constructor arguments in the object store and max_restarts > 0.\\n\\n")
    print("from Python")
    os.write(2, b"[E] something real\\n")
    {ending}
print("result")
print("afterwards", file=sys.stderr)
"""


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("os.abort()", -6)])
def test_one_remark_of_rays_core_is_kept_off_the_terminal_and_nothing_else(ending: str, code: int, tmp_path: Path) -> None:
    """Also what a process says last before it dies arrives."""
    with (tmp_path / "err").open("wb") as err:
        program = CORE.format(ending=ending)
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=err, text=True, check=False)
    eventually(lambda: "real" in (tmp_path / "err").read_text(), "the last words")  # grep may outlive the process by a moment
    lines = set((tmp_path / "err").read_text().splitlines())
    assert done.returncode == code and done.stdout == ("" if code else "result\n")
    assert lines - {"afterwards"} == {"from Python", "[E] something real"}
    assert ("afterwards" in lines) == (code == 0)


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator import api
    from orchestrator.cli import main
    from orchestrator.errors import Terminated

    root = Path(__file__).parents[2]
    job = os.path.relpath(root / "jobs" / "quickstart.yaml")
    monkeypatch.setattr(os, "_exit", sys.exit)
    for stopped, code in ((KeyboardInterrupt, 130), (Terminated, 143)):

        def run(_plan: object, stopped: type[BaseException] = stopped) -> None:
            raise stopped

        monkeypatch.setattr(api, "run", run)
        monkeypatch.setattr(sys, "argv", ["distill", "run", job, "--set", "storage=two words"])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        assert (ending.value.code, out, err.count("\n")) == (code, "", 1)
        assert "is kept" in err and err.endswith(f"distill run {job} --set 'storage=two words'\n")


@pytest.mark.parametrize(("level", "shown"), [(logging.WARNING, "careful\n"), (logging.NOTSET, "by the way\ncareful\n")])
def test_quiet_leaves_the_warnings(
    level: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("orchestrator"), "level", level)
    display = Display()
    display.say("by the way")
    display.warn("careful")
    assert capsys.readouterr().err == shown


def test_verbose_and_quiet_set_how_much_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.cli import main

    log = logging.getLogger("orchestrator")
    monkeypatch.setattr(log, "level", logging.NOTSET)
    monkeypatch.setattr(log, "handlers", [])
    for option, level in (("-q", logging.WARNING), ("-v", logging.DEBUG)):
        monkeypatch.setattr(sys, "argv", ["distill", "run", "nowhere.yaml", option])
        with pytest.raises(SystemExit):
            main()
        assert log.level == level
    assert "Traceback" in capsys.readouterr().err, "with -v, an error comes with the way to it"
