"""What a user can get wrong: one line that says what, the exit code for it, and everything kept that was there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import (
    Json,
    assert_every_row_labelled_once,
    commits,
    contents,
    distill,
    started,
    tiny_job,
    write_corpus,
    write_job,
)
from tests.tiny import model as tiny_model

pytestmark = pytest.mark.timeout(1200)

MAX_CHARS = 300
PREFIX = "distill: "
SPEC, DATA, ENVIRONMENT, LOCKED = 2, 3, 4, 7


def assert_refused(code: int, stderr: str, expected: int, *words: str) -> None:
    """The last line, and no other, says in at most 300 characters what is wrong."""
    assert code == expected, stderr[-4000:]
    assert "Traceback" not in stderr, stderr[-4000:]
    *others, last = stderr.strip().split("\n")
    assert last.startswith(PREFIX) and len(last) <= len(PREFIX) + MAX_CHARS, stderr[-4000:]
    assert not [line for line in others if line.startswith(PREFIX)]
    for word in words:
        assert word in last


@pytest.fixture
def job(tmp_path: Path) -> Json:
    return tiny_job(write_corpus(tmp_path / "corpus"), tmp_path / "store")


def refuse(folder: Path, job: Json, expected: int, *words: str) -> None:
    """Run `job`, which must be refused before Ray is started."""
    ended = distill(folder / "log", "run", write_job(job, folder))
    assert_refused(ended.code, ended.stderr, expected, *words)
    assert not ended.started("raylet")


# Refused before Ray is started.


@pytest.mark.slice
def test_a_name_that_leaves_the_storage(job: Json, tmp_path: Path) -> None:
    before = contents(tmp_path)
    refuse(tmp_path, job | {"name": "../x"}, SPEC, "name", "../x")
    assert not (tmp_path / "x").exists() and not (tmp_path / "store").exists()
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.slice
def test_a_storage_that_is_not_supported(job: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path, job | {"storage": "gs://bucket/folder"}, SPEC, "storage", "gs://bucket/folder")
    assert not (tmp_path / "gs:").exists()


@pytest.mark.slice
def test_a_storage_that_is_a_file(job: Json, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("precious")
    refuse(tmp_path, job, ENVIRONMENT, "storage", str(tmp_path / "store"))
    assert (tmp_path / "store").read_text() == "precious"


def test_a_storage_that_cannot_be_made(job: Json, tmp_path: Path) -> None:
    refuse(tmp_path, job | {"storage": "/proc/no-such/store"}, ENVIRONMENT, "/proc/no-such/store")


@pytest.mark.slice
def test_a_run_that_is_going_on_elsewhere(job: Json, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text("precious")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("elsewhere:42 since 2026-01-01T00:00:00Z")
        lock.flush()
        before = contents(folder)
        refuse(tmp_path, job, LOCKED, "elsewhere:42")
        assert contents(folder) == before


# Refused once it is looked at. One process runs all of these, on one Ray.


@dataclass(frozen=True)
class Case:
    """A job with something wrong in it."""

    code: int
    words: tuple[str, ...]
    changes: Json


@dataclass(frozen=True)
class Outcome:
    code: int
    stderr: str
    files: dict[str, str]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights and a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tiny_model(1)["config"], vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder)
    return folder


def poisoned(teacher: Path, folder: Path) -> Path:
    """A copy of `teacher` with one weight that is not a number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def taught(job: Json, teacher: Path) -> Json:
    """`job` with the given teacher, and short."""
    few = job["train"] | {"steps": 10, "warmup_steps": 2}
    data = job["data"] | {"tokenizer": {"kind": "teacher"}}
    given = {"kind": "transformers", "path": str(teacher), "dtype": "fp32"}
    return job | {"data": data, "teacher": given, "train": few}


def wrong(good: Json, teacher: Path, folder: Path) -> dict[str, Case]:
    """Everything that is tried, by the name of its job."""

    def text(path: Path) -> Json:
        return {"data": good["data"] | {"source": {"kind": "text", "paths": [str(path)]}}}

    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"plain text and then caf\xe9\n")
    bare = folder / "bare"
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("tokenizer.json"))
    nan = poisoned(teacher, folder / "nan")

    def keeping(feature: Json) -> Json:
        return good["labels"] | {"features": {"keep": [feature]}}

    matched = good["objective"] | {"features": [{"kind": "mse", "weight": 1.0}]}
    unkept = {"labels": keeping({"layer": 1, "part": "values"}), "objective": matched}
    config = {"type": "llama", "config": tiny_model(1)["config"] | {"vocab_size": 600}}
    huge = good["teacher"] | {"cpus_per_shard": 64}
    spread = good["teacher"] | {"shards": 2}
    uneven = good["teacher"] | {"shards": 3, "cpus_per_shard": 0.25}
    return {
        "missing": Case(DATA, ("data.source", "nowhere.txt"), text(folder / "nowhere.txt")),
        "empty": Case(DATA, ("data.source",), text(folder / "empty.txt")),
        "undecodable": Case(DATA, ("latin.txt", "UTF-8", "byte 23"), text(folder / "latin.txt")),
        "no-tokenizer": Case(SPEC, ("teacher.path", "tokenizer.json"), {"teacher": good["teacher"] | {"path": str(bare)}}),
        "vocabulary": Case(SPEC, ("vocab_size", "600", "300"), {"student": {"kind": "config", "model": config}}),
        "resources": Case(ENVIRONMENT, ("65 CPU", "has 2"), {"teacher": huge}),
        "shards": Case(ENVIRONMENT, ("teacher.shards 2", "3 CPU", "has 2"), {"teacher": spread}),
        "heads": Case(SPEC, ("teacher.shards", "3", "2 attention heads"), {"teacher": uneven}),
        "nan": Case(DATA, ("shard", "finite"), {"teacher": good["teacher"] | {"path": str(nan)}}),
        "k": Case(SPEC, ("labels.k", "400", "300"), {"labels": {"kind": "topk", "k": 400}}),
        "no-layer": Case(SPEC, ("labels.features", "hidden.9"), {"labels": keeping({"layer": 9})}),
        "not-kept": Case(SPEC, ("objective.features", "hidden.1"), unkept),
    }


CASES = (
    *("missing", "empty", "undecodable", "no-tokenizer", "vocabulary", "resources", "shards", "heads"),
    *("nan", "k", "no-layer", "not-kept"),
)


@pytest.fixture(scope="module")
def tried(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Case], dict[str, Outcome]]:
    """The cases and what became of them; `good` came first, in the same storage."""
    folder = tmp_path_factory.mktemp("wrong")
    good = taught(tiny_job(write_corpus(folder / "corpus"), folder / "store"), teacher)
    cases = wrong(good, teacher, folder)
    assert set(cases) == set(CASES)
    jobs = {"good": good} | {name: good | case.changes for name, case in cases.items()}
    files = [write_job(job | {"name": name}) for name, job in jobs.items()]
    with started(folder / "log", "-m", "tests.several", *files) as several:
        ended = several.wait().assert_ok()
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    return cases, {name: Outcome(**line) for name, line in zip(jobs, lines, strict=True)}


def test_the_job_itself_is_good(tried: Any) -> None:
    good = tried[1]["good"]
    assert good.code == 0 and PREFIX not in good.stderr
    assert [file for file in good.files if file.startswith("student/")]


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tried: Any) -> None:
    cases, outcomes = tried
    case, outcome = cases[name], outcomes[name]
    assert_refused(outcome.code, outcome.stderr, case.code, *case.words)
    kept = outcomes["good"].files
    assert {file: outcome.files.get(file) for file in kept} == kept, "a file of a finished run has changed"


def test_no_label_of_a_broken_teacher_is_committed(tried: Any) -> None:
    _, outcomes = tried

    def committed(name: str) -> set[str]:
        return {file for file in outcomes[name].files if file.startswith("labels/") and "/commits/" in file}

    assert committed("good")
    assert committed("nan") == committed("good")


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own, in memory; `resize` changes its size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)


def test_a_disk_that_is_full_already(job: Json, small_disk: Path, tmp_path: Path) -> None:
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(b"x" * 4096):
            pass
    refuse(tmp_path, job | {"storage": str(small_disk / "store")}, ENVIRONMENT, "disk full", str(small_disk))


def test_a_disk_that_fills_up_while_labels_are_written(job: Json, teacher: Path, small_disk: Path, tmp_path: Path) -> None:
    resize(small_disk, 100_000)
    storage = small_disk / "store"
    few = taught(job, teacher) | {"storage": str(storage)}
    few["train"] = few["train"] | {"steps": 300}
    few["data"] = few["data"] | {"seq_len": 64}  # so that every shard is demanded
    prepare(few, tmp_path)
    used = (shutil.disk_usage(small_disk).used + 1023) // 1024
    resize(small_disk, used + 400)
    file = write_job(few, tmp_path)
    full = distill(tmp_path / "full", "run", file)
    assert_refused(full.code, full.stderr, ENVIRONMENT, "disk full")
    before = commits(storage)
    assert before, "the disk was full before the first label"
    resize(small_disk, 100_000)
    ended = distill(tmp_path / "again", "run", file).assert_ok()
    assert f"resuming, {len(before)}/" in ended.stderr
    assert before.items() <= commits(storage).items()
    assert_every_row_labelled_once(storage)


def prepare(job: Json, folder: Path) -> None:
    """Bring the data of `job` into its storage: a whole run, of which only the data stays."""
    distill(folder / "prepare", "run", write_job(job, folder / "prepare")).assert_ok()
    for stage in ("labels", "student", "runs"):
        shutil.rmtree(Path(job["storage"]) / stage)
