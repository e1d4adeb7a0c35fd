"""A job small enough to be run, killed and run again within a minute, and the means to watch and judge it from outside.

Nothing here asks the code under test what is right: what must be in the storage is worked out from its files alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

DISTILL = ("-m", "orchestrator.cli")
"""`distill` for the same Python that runs the tests."""
LABELLER, TRAINER = "MapBatches(Labeller)", "RayTrainWorker"
"""In the title of a teacher actor's process, and of a training worker's."""
PATIENCE_S = 900.0
"""Far more than anything takes: a busy machine must not fail a test."""
CORPUS_BYTES, DOCUMENT_CHARS = 120_000, 1_500
STEPS = 300
SHARD_ROWS = 16
GLOBAL_BATCH = 8

Json = dict[str, Any]


# The job.


def write_corpus(folder: Path) -> Path:
    """Real text of about `CORPUS_BYTES`, in files of its own, so that nothing but the test can change it."""
    folder.mkdir(parents=True)
    source = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(file.read_text() for file in sorted([*source.glob("json/*.py"), *source.glob("email/*.py")]))
    for start in range(0, CORPUS_BYTES, DOCUMENT_CHARS):
        (folder / f"{start:06d}.py").write_text(text[start : start + DOCUMENT_CHARS])
    return folder


def model(layers: int) -> Json:
    """A llama of a few ten thousand parameters."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    return {"type": "llama", "config": config | {"num_key_value_heads": 2, "tie_word_embeddings": True}}


def tiny_job(corpus: Path, storage: Path) -> Json:
    """More steps than one epoch has, so that every token shard is demanded; checkpoints every few steps."""
    return {
        "name": "tiny",
        "storage": str(storage),
        "data": {
            "source": {"kind": "text", "paths": [f"{corpus}/*.py"]},
            "tokenizer": {"kind": "train", "vocab_size": 512},
            "seq_len": 32,
            "rows_per_shard": SHARD_ROWS,
            "heldout_fraction": 0.2,
        },
        "teacher": {
            "kind": "pretrain",
            "dtype": "fp32",
            "model": model(2),
            "train": {"steps": 10, "warmup_steps": 2, "global_batch": 8, "precision": "fp32"},
        },
        "labels": {"kind": "sampled", "samples": 20},
        "student": {"kind": "config", "model": model(1)},
        "objective": {"alpha": 0.1},
        "train": {
            "steps": STEPS,
            "global_batch": GLOBAL_BATCH,
            "micro_batch": 2,
            "precision": "fp32",
            "checkpoint_every": 20,
        },
        "evaluate": {"rows": 8, "baseline": False},
        "tracking": {"enabled": False},
    }


def write_job(job: Json, folder: Path | None = None) -> Path:
    """`job` as a file in `folder`, or beside its storage; JSON is YAML."""
    file = (folder or Path(job["storage"]).parent) / f"{job['name'].replace('/', '-')}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(job, indent=1))
    return file


# Running it.


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    titles: set[str]
    """Command lines of the processes it had started, as seen ten times a second."""

    def started(self, title: str) -> bool:
        """Whether there was a process with `title` in its command line."""
        return any(title in seen for seen in self.titles)

    def assert_ok(self) -> Ended:
        assert self.code == 0, f"exit code {self.code}\n{self.stderr[-6000:]}"
        return self


class Command:
    """`python ARGS` in a session of its own, its output in files of `folder`; `env` is added to the environment."""

    def __init__(self, folder: Path, *args: str | Path, env: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "RAY"))} | (env or {})
        command = [sys.executable, *map(str, args)]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._popen = subprocess.Popen(command, stdout=out, stderr=err, env=plain, start_new_session=True)
        self._started = time.monotonic()
        self._process = psutil.Process(self._popen.pid)
        self._family: dict[psutil.Process, None] = {}
        self._titles: set[str] = set()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Every process seen so far that the command started and that still lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= dict.fromkeys(self._process.children(recursive=True))
        family = [p for p in self._family if alive(p)]
        self._titles.update(map(command_line, family))
        return family

    def members(self, title: str) -> list[psutil.Process]:
        """Processes of the family with `title` in their command line."""
        return [p for p in self.family() if title in command_line(p)]

    def until(self, condition: Callable[[], Any], every_s: float = 0.01) -> float:
        """Wait, as long as the command runs, for `condition`; returns the seconds."""
        began = time.monotonic()
        while not condition():
            assert self.running and time.monotonic() < began + PATIENCE_S, self.stderr[-4000:]
            time.sleep(every_s)
        return time.monotonic() - began

    def interrupt(self) -> None:
        """What Ctrl-C sends."""
        self.send(signal.SIGINT)

    def send(self, number: signal.Signals) -> None:
        """SIGINT to the process group, as a terminal sends it, another signal to the command alone; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGINT else os.kill)(self._popen.pid, number)

    def kill(self) -> None:
        """SIGKILL to the process group of the command."""
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(PATIENCE_S)

    def wait(self) -> Ended:
        end = time.monotonic() + PATIENCE_S
        while self.running:
            assert time.monotonic() < end, f"still running after {PATIENCE_S} s:\n{self.stderr[-6000:]}"
            self.family()
            time.sleep(0.1)
        seconds = time.monotonic() - self._started
        return Ended(self._popen.returncode, self._out.read_text(), self.stderr, seconds, self._titles)

    def end(self) -> None:
        """End the command and everything that it started."""
        family = self.family()
        if self.running:
            self.kill()
        for process in family:
            kill(process)
        psutil.wait_procs(family, PATIENCE_S)


@contextlib.contextmanager
def started(folder: Path, *args: str | Path, env: dict[str, str] | None = None) -> Iterator[Command]:
    """A running `python ARGS`; nothing of it is left when the block ends."""
    command = Command(folder, *args, env=env)
    try:
        yield command
    finally:
        command.end()


def distill(folder: Path, *args: str | Path, env: dict[str, str] | None = None) -> Ended:
    """Run `distill ARGS` to its end."""
    with started(folder, *DISTILL, *args, env=env) as command:
        return command.wait()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> bool:
    """SIGKILL; True if it hit a process that lived."""
    if not alive(process):
        return False
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def eventually(condition: Callable[[], Any], what: str, every_s: float = 0.05) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(every_s)


# Looking into the storage.


def only(folder: Path) -> Path:
    """The one complete entry of `folder`."""
    (found,) = (p for p in folder.iterdir() if not p.name.startswith(".tmp"))
    return found


def commits(storage: Path) -> dict[str, bytes]:
    """Commit records of the label logs in `storage`, by file name."""
    return {f.name: f.read_bytes() for f in storage.glob("labels/*/commits/*.json")}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def student_weights(storage: Path) -> str:
    """Hex SHA-256 of the weights of the one student in `storage`."""
    return sha256(only(storage / "student") / "model" / "model.safetensors")


def metric_points(storage: Path, stage: str, name: str = "tiny") -> list[Json]:
    """Points of `stage` in the run's metrics.jsonl; a line that is still being written is left out."""
    file = storage / "runs" / name / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(errors="replace").split("\n")[:-1]
    return [p for p in map(json.loads, lines) if p["stage"].partition(":")[0] == stage]


def steps_seen(storage: Path) -> int:
    """Optimizer steps of the student that the run has recorded."""
    return max((p["step"] + 1 for p in metric_points(storage, "student")), default=0)


def report(storage: Path, name: str = "tiny") -> Json:
    return json.loads((storage / "runs" / name / "report.json").read_text())


def stages(storage: Path, name: str = "tiny") -> Json:
    """The stages in run.json, by name."""
    return json.loads((storage / "runs" / name / "run.json").read_text())["stages"]


def statuses(storage: Path, name: str = "tiny") -> dict[str, str]:
    return {stage: record["status"] for stage, record in stages(storage, name).items()}


def contents(folder: Path) -> dict[str, str]:
    """Hex SHA-256 of every file in `folder`, by relative name; empty if there is no such folder."""
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def row_ids(folder: Path, records: list[Json]) -> Counter[bytes]:
    """How often each row id stands in the shards of `records`; every file must be what its record says."""
    found: Counter[bytes] = Counter()
    for record in records:
        assert sha256(folder / record["file"]) == record["sha256"], record["file"]
        ids = pq.read_table(folder / record["file"], columns=["row_id"])["row_id"].to_pylist()
        assert len(ids) == record["rows"], record["file"]
        found.update(ids)
    return found


def token_records(storage: Path) -> list[Json]:
    """What the storage says of each training shard of the only corpus in it."""
    pages = sorted((only(storage / "data") / "train" / "pages").iterdir())
    return [record for page in pages for record in json.loads(page.read_text())]


def assert_every_row_labelled_once(storage: Path, name: str = "tiny") -> None:
    """Each row of the token shards has exactly one label row, and report.json says so."""
    tokens = only(storage / "data")
    planned = row_ids(tokens / "train", token_records(storage))
    labels = only(storage / "labels")
    committed = row_ids(labels / "data", [json.loads(data) for data in commits(storage).values()])
    assert set(planned.values()) == {1}, "row ids are not unique"
    assert committed == planned
    rows = len(planned)
    assert report(storage, name)["ledger"] == {"planned": rows, "committed": rows, "quarantined": 0, "duplicates": 0}


# An undisturbed run to compare with.


@dataclass(frozen=True)
class Reference:
    """A finished run that nobody disturbed."""

    job: Json
    storage: Path
    weights: str
    """Hex SHA-256 of the student's weights."""
    shards: int
    labels_s: float
    """From the start of labelling to its end."""
    student_s: float
    """From the start of labelling to the end of the student's training."""

    def copy(self, folder: Path, *kept: str) -> Json:
        """A job on a copy of the storage in which data, teacher and the stages `kept` are done, labels with held-out ones."""
        storage = folder / "store"
        for stage in ("data", "teacher", *kept, *(["heldout"] if "labels" in kept else [])):
            shutil.copytree(self.storage / stage, storage / stage)
        return self.job | {"storage": str(storage)}


def make_reference(folder: Path) -> Reference:
    """Run the tiny job once, undisturbed."""
    storage = folder / "store"
    job = tiny_job(write_corpus(folder / "corpus"), storage)
    ended = distill(folder / "log", "run", write_job(job)).assert_ok()
    assert_every_row_labelled_once(storage)
    seconds = [stages(storage)[name]["seconds"] for name in ("labels", "student")]  # they begin together
    reference = Reference(job, storage, student_weights(storage), len(commits(storage)), *seconds)
    facts = {
        "shards": reference.shards,
        "run_s": ended.seconds,
        "labels_s": reference.labels_s,
        "student_s": reference.student_s,
    }
    print(json.dumps({"reference": {name: round(value, 1) for name, value in facts.items()}}), flush=True)
    return reference
