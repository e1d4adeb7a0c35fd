"""Every command, job snippet, program and link of README.md and docs/ does what it says.

A page's blocks of ```bash are run in one directory, page after page as a reader would; those that need what is not here
(```bash cluster, gpu, s3, install) are read by the command's own parser alone.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import pytest
import typer

from orchestrator.cli import app
from orchestrator.spec.load import load_job, resolved_yaml
from tests.field.cases import save_model, write_jsonl

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
STORY = (
    "README",
    "sweep",
    "own-text",
    "python",
    "prompt-response",
    "own-teacher",
    "cluster",
    "gpu",
    "serve",
    "clean-up",
    "troubleshooting",
)
"""Pages whose commands are run, each after those whose files it uses."""
QUICK = ("train.steps=6", "train.warmup_steps=1", "evaluate.rows=4", "evaluate.baseline=false", "tracking.enabled=false")
FROM_SCRATCH = ("teacher.train.steps=4", "teacher.train.warmup_steps=1", "teacher.train.workers=1")


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(marker, text) of the fenced blocks of `page` in `language`."""
    return re.findall(rf"^```{language} ?(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """(marker, line) of every command line."""
    for marker, block in blocks(page, "bash"):
        for line in block.splitlines():
            yield marker, line


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory a reader works in, with a folder of text, rows, and a teacher."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "notes").mkdir()
    names = sorted(topics.topics)[:30]
    for name in names:
        (folder / "notes" / f"{name}.md").write_text(f"# {name}\n{topics.topics[name][:2500]}")
    parts = [(name, part) for name in names for part in topics.topics[name].split("\n\n")[:10]]
    write_jsonl(folder / "qa.jsonl", [{"question": f"What of {name}?", "answer": part} for name, part in parts])
    save_model(folder / "teacher")
    return folder


def run(folder: Path, *command: str) -> None:
    """Run `command` in `folder` as a reader would who has activated the environment."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "RAY"))}
    path = {"PATH": f"{Path(sys.executable).parent}:{plain['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=plain | path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, command[-1]


def make_quick(file: Path) -> None:
    """Make what `distill init` wrote a matter of seconds; everything else about it stays."""
    own = load_job(file).teacher.kind == "transformers"
    file.write_text(resolved_yaml(load_job(file, [*QUICK, *(() if own else FROM_SCRATCH)])))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STORY)
def test_commands_and_programs_of_a_page(name: str, desk: Path) -> None:
    page = next(page for page in PAGES if page.stem == name)
    lines = [line for marker, line in commands(page) if not marker]
    programs = [text for _, text in blocks(page, "python")]
    assert lines or programs, "a page of the story has something to run"
    for line in lines:
        file = desk / shlex.split(line)[2] if line.startswith("distill init ") else None
        if file:
            file.unlink(missing_ok=True)  # another page may write a job of the same name
        run(desk, "bash", "-c", line)
        if file:
            make_quick(file)
    for program in programs:
        run(desk, sys.executable, "-c", program)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known_to_the_command(page: Path) -> None:
    distill = typer.main.get_command(app)
    for words in (shlex.split(line) for _, line in commands(page)):
        if words[0] == "distill":
            verb = distill.commands[words[1]]  # pyright: ignore[reportAttributeAccessIssue]
            verb, rest = (verb.commands[words[2]], words[3:]) if hasattr(verb, "commands") else (verb, words[2:])
            verb.make_context(shlex.join(words), rest)
        if words[0] == "make":
            assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        for marker, line in commands(page):
            assert marker in ("", "cluster", "gpu", "s3", "install"), line
            assert marker or page.stem in STORY, f"{page.name}: {line} is run by nobody"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_job_snippets_load(page: Path, tmp_path: Path) -> None:
    for _, snippet in blocks(page, "yaml"):
        sections = {"name": "name: snippet\n", "tokenizer": ""}
        if "teacher: {kind: transformers" in snippet and "tokenizer" not in snippet:
            sections["tokenizer"] = "data: {tokenizer: {kind: teacher}}\n"
        (tmp_path / "job.yaml").write_text("".join(sections.values()) + snippet)
        load_job(tmp_path / "job.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_pages_are_short() -> None:
    long = {page.name: len(page.read_text().splitlines()) for page in PAGES if page.stem not in ("README", "reference")}
    assert max(long.values()) <= 80, json.dumps(long)


def test_messages_of_the_troubleshooting_page_are_messages_of_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "orchestrator").rglob("*.py"))
    rows = re.findall(r"^\| (`[^|]*`) \|", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 12
    for message in messages:
        said = max(re.split(r" ?…,? ?|\b[A-Z]+\b|'", message), key=len).strip()
        assert said in source, f"{message}: the code does not say {said!r}"
