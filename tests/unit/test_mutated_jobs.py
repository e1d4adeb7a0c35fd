"""Whatever is done to a job file, it is either still valid or refused with one line, and nothing is left on disk."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job import Job
from orchestrator.spec.load import load_job, resolved_yaml

SEED = 46
MUTATIONS = 300

WRONG_VALUES = [
    "-1",
    "0",
    "1.5",
    "1e400",
    "x",
    "''",
    "null",
    "[]",
    "{}",
    "{a: 1}",
    "[1, x]",
    "*a",
    "&a 1",
    "!!python/none",
    "'",
    "{",
]
WRONG_VALUES += ["${oc.env:ABSENT_VARIABLE}", "${name}", "../..", "y" * 300, "\x1b[31m", '"\\0"', "9" * 400, "- 1", "true"]
WRONG_BYTES = [
    b"\t",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"'",
    b"[",
    b"}",
    b":",
    b"\n",
    b"---\n",
    b"\\",
    b"%",
    b"\x85",
    b"? ",
    b"|",
]

Lines = list[str]


def misspell(lines: Lines, at: int, pick: random.Random) -> None:
    letter = pick.choice("abcxyz_")
    place = re.search(r"\w", lines[at])
    assert place
    lines[at] = lines[at][: place.start() + 1] + letter + lines[at][place.start() + 1 :]


def change_value(lines: Lines, at: int, pick: random.Random) -> None:
    lines[at] = re.sub(r"(- |: ?).*", "", lines[at], count=1) + (": " if ":" in lines[at] else "- ") + pick.choice(WRONG_VALUES)


def drop(lines: Lines, at: int, pick: random.Random) -> None:
    del lines[at : at + pick.randint(1, 3)]


def repeat(lines: Lines, at: int, pick: random.Random) -> None:
    lines.insert(pick.randint(0, len(lines)), lines[at])


def indent(lines: Lines, at: int, pick: random.Random) -> None:
    lines[at] = pick.choice([" ", "  ", "\t", "    "]) + lines[at]


def cut_off(lines: Lines, at: int, pick: random.Random) -> None:
    del lines[at + 1 :]
    lines[at] = lines[at][: pick.randint(0, len(lines[at]))]


EDITS: list[Callable[[Lines, int, random.Random], None]] = [misspell, change_value, change_value, drop, repeat, indent, cut_off]


def mutate(text: str, pick: random.Random) -> bytes:
    """`text` with one line edited, or some bytes put in between."""
    if pick.random() < 0.2:
        raw, at = text.encode(), pick.randrange(len(text))
        return raw[:at] + pick.choice(WRONG_BYTES) + raw[at:]
    lines = text.splitlines()
    pick.choice(EDITS)(lines, pick.randrange(len(lines)), pick)
    return "\n".join(lines).encode()


def test_mutated_job_is_valid_or_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ABSENT_VARIABLE", raising=False)
    valid = resolved_yaml(Job(name="full"))
    file = Path("job.yaml")
    refused = 0
    for number in range(MUTATIONS):
        print(f"seed {SEED}, mutation {number}")
        file.write_bytes(mutate(valid, random.Random(f"{SEED}-{number}")))
        before = sorted(Path.cwd().rglob("*"))
        try:
            assert isinstance(load_job(file), Job)
        except SpecError as error:
            refused += 1
            message = str(error)
            assert error.exit_code == 2
            assert len(message) <= 300
            assert message.isprintable()
            assert message.startswith("job.yaml:")
        assert sorted(Path.cwd().rglob("*")) == before
    assert 200 <= refused < MUTATIONS
