"""Every command of the README does what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
SMALL = (
    "data.source.kind=text",
    "data.seq_len=32",
    "data.rows_per_shard=16",
    "data.tokenizer.vocab_size=400",
    "data.heldout_fraction=0.3",
    "teacher.train.steps=4",
    "teacher.train.global_batch=8",
    "teacher.train.warmup_steps=1",
    "teacher.train.workers=1",
    "train.steps=6",
    "train.global_batch=8",
    "train.warmup_steps=1",
    "evaluate.rows=4",
    "evaluate.baseline=false",
)
"""Makes the quickstart a matter of seconds; everything else about it stays."""


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def job_snippets() -> list[str]:
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    return blocks + re.findall(r"^- `((?:student|train): \{.*\})`", README, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme") / "distill-store"


def distill(line: str, storage: Path) -> subprocess.CompletedProcess[str]:
    """Run a `distill` line of the README in the checkout, small, and with its storage elsewhere."""
    words = shlex.split(line.replace("distill-store", str(storage)))
    if "KEY" in line:
        (key,) = (storage / "labels").iterdir()
        words = [w.replace("KEY", key.name) for w in words]
    if words[1] in ("compare", "sweep"):
        words += ["--out", str(storage.parent / "compare.html")]
    if words[1] in ("run", "plan", "sweep"):
        text = sorted(str(p) for p in (ROOT / "orchestrator").rglob("*.py"))
        settings = [*SMALL, f"data.source.paths={json.dumps(text)}", f"storage={storage}"]
        words += [part for setting in settings for part in ("--set", setting)]
    return subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_command_of_the_readme(storage: Path) -> None:
    lines = commands()
    assert len(lines) >= 9
    for line in lines:
        if line.startswith("make "):
            done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        else:
            done = distill(line, storage)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert "Traceback" not in done.stderr, line


def test_changing_the_objective_reused_all_labels(storage: Path) -> None:
    report = json.loads((storage / "runs" / "quickstart" / "report.json").read_text())
    assert report["labels"]["reused_shards"] == report["labels"]["shards"] > 0


def test_job_snippets_are_valid(tmp_path: Path) -> None:
    from orchestrator.spec.load import load_job

    snippets = job_snippets()
    assert len(snippets) > 8
    for snippet in snippets:
        file = tmp_path / "job.yaml"
        # On rows enough for eight workers, which the snippets leave to the reader.
        file.write_text("name: snippet\n" + snippet.replace("train: {", "train: {global_batch: 32, ", 1))
        load_job(file)


def test_sources_named_in_the_readme_exist() -> None:
    from orchestrator.data.sources import READERS

    named = set(re.findall(r"`\{kind: (\w+)", README)) & {"text", "jsonl", "parquet", "dataset"}
    assert named == set(READERS) - {"stdlib"}
