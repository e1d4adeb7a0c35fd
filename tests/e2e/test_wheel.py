"""What a user has who installed a wheel: no checkout, an empty directory, and own text, rows or a teacher to begin with.

By default the wheel goes into an environment of its own that sees the dependencies of the one that runs the tests; with
`--clean-install` everything is installed anew (`make wheel-check`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import pytest

from tests.field.cases import save_model, write_jsonl

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
CASES = {"text": ["--text", "notes"], "rows": ["--rows", "qa.jsonl"], "teacher": ["--teacher", "teacher", "--rows", "qa.jsonl"]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout without what earlier builds left there."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "orchestrator", folder / "source" / "orchestrator", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    """The interpreter of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    began = time.monotonic()
    clean = bool(request.config.getoption("--clean-install", False))  # which exists only where pytest is pointed at this folder
    venv.create(folder, with_pip=clean, symlinks=True)
    interpreter = str(folder / "bin" / "python")
    if clean:
        index = ["-c", ROOT / "constraints.txt"]
        pip(interpreter, "install", *index, "torch>=2.13,<2.14")
        pip(interpreter, "install", *index, wheel)
    else:
        site = next(folder.glob("lib/python*/site-packages"))
        pip(sys.executable, "--python", interpreter, "install", "--no-deps", wheel)
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    print(json.dumps({"clean": clean, "install_s": round(time.monotonic() - began, 1)}))
    yield interpreter
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing in it but what the user has."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "notes").mkdir()
    names = sorted(topics.topics)
    for name in names[:30]:
        (folder / "notes" / f"{name}.md").write_text(f"# {name}\n{topics.topics[name][:6000]}")
    pairs = [
        {"question": f"What does Python say of {name}?", "answer": part}
        for name in names[:40]
        for part in topics.topics[name].split("\n\n")[:12]
    ]
    write_jsonl(folder / "qa.jsonl", pairs)
    save_model(folder / "teacher")
    return folder


def pip(interpreter: str, *args: str | Path) -> None:
    command = [interpreter, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def user(python: str, folder: Path, *args: str) -> str:
    """What a command in `folder` prints, without anything of the checkout in its environment."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW", "RAY", "VIRTUAL_ENV"))}
    done = subprocess.run([python, *args], cwd=folder, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stderr[-3000:]}"
    return done.stdout


def test_the_package_is_the_wheels_and_whole(python: str, wheel: Path, empty: Path) -> None:
    where = user(python, empty, "-c", "import orchestrator; print(orchestrator.__file__ or orchestrator.__path__[0])").strip()
    assert Path(where).is_relative_to(Path(python).parents[1])
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("orchestrator/")}
    ours = subprocess.run(
        ["git", "ls-files", "orchestrator"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in ours if not name.endswith("README.md")} <= packed
    assert importlib.metadata.version("distill-orchestrator") in wheel.name


@pytest.mark.parametrize("case", CASES)
def test_from_an_empty_directory_to_a_report(case: str, python: str, empty: Path) -> None:
    distill = str(Path(python).parent / "distill")
    began = time.monotonic()
    job, storage = f"{case}.yaml", f"store-{case}"
    assert f"distill run {job}" in user(python, empty, distill, "init", job, *CASES[case])
    assert "windows" in user(python, empty, distill, "plan", job)
    report = json.loads(user(python, empty, distill, "run", job, "--json", "--set", f"storage={storage}"))
    print(json.dumps({"case": case, "seconds": round(time.monotonic() - began, 1)}))
    assert all(report[model]["heldout_ce_nats"] > 0 for model in ("teacher", "student", "baseline"))
    assert list((empty / storage).glob("runs/*/report.html"))
