"""What cannot work is said before it costs time: `plan`, `doctor` and `run` go through one list of checks, without Ray.

The inputs are those of users' reports; each test says which kind of fault it is. `refused` also holds that all three say the
same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checks import check as checks
from orchestrator.checks import machine
from orchestrator.errors import MAX_MESSAGE_CHARS, DistillError
from orchestrator.plan.checkpoint import POSITION_TABLES
from orchestrator.plan.make import make_plan
from orchestrator.runtime.machine import Gpu, Machine
from orchestrator.spec.load import load_job
from tests.field import cases
from tests.tiny import Json, write_job

ROOT = Path(__file__).parents[2]
GIB = 2**30
LAPTOP = Machine(cores=2, memory=16 * GIB, free_memory=12 * GIB, gpus=())
SPEC, DATA, ENVIRONMENT = 2, 3, 4


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine for every test, whatever this one has."""
    monkeypatch.setattr(checks, "this_machine", lambda: LAPTOP)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_jsonl(tmp_path_factory.mktemp("data") / "base.jsonl", cases.texts(160))


@pytest.fixture
def job(tmp_path: Path, teacher: Path, corpus: Path) -> Json:
    return cases.field_job(tmp_path, "case", teacher, corpus)


def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `distill ARGS` in a process in which starting Ray is an error."""
    from orchestrator.cli import main

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("orchestrator.run.opening.ray_session", no_ray)
    monkeypatch.setattr(sys, "argv", ["distill", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main()
    said = capsys.readouterr()
    return int(ending.value.code or 0), said.out, said.err


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def judge(job: Json, code: int, *words: str) -> str:
        """The line that `plan`, `doctor` and `run` of `job` all say, which holds all `words`."""
        file = write_job(job)
        ended, _, planned = cli(monkeypatch, capsys, "plan", file)
        assert ended == code, planned
        ended, _, ran = cli(monkeypatch, capsys, "run", file)
        assert (ended, ran.count("\n")) == (code, 1), ran
        assert ran == planned and len(ran) <= len("distill: ") + MAX_MESSAGE_CHARS + 1
        assert not (Path(job["storage"]) / "runs").exists()
        ended, found, _ = cli(monkeypatch, capsys, "doctor", file)
        line = ran.removeprefix("distill: ").strip()
        assert ended == ENVIRONMENT
        assert [row for row in found.splitlines() if row.startswith("MISSING") and line.partition(": ")[2] in row], found
        for word in words:
            assert word in line
        return line

    return judge


def found(job: Json) -> list[str]:
    """Everything that is said of `job` beforehand."""
    return [finding.line for finding in checks.check(make_plan(load_job(write_job(job)))).findings]


# Nothing is wrong.


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_the_jobs_of_the_repository_are_good(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)  # of the teacher that is a package
    assert not checks.check(make_plan(load_job(file))).findings


def test_a_good_job_meets_nothing(job: Json) -> None:
    assert found(job) == []


# Paths.


def test_a_glob_that_matches_nothing(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    source = {"kind": "text", "paths": [f"{tmp_path}/docs/**/*.md"]}
    refused(job | {"data": job["data"] | {"source": source}}, DATA, "data.source.paths", "docs/**/*.md")


def test_a_teacher_that_is_not_there(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    refused(job | {"teacher": job["teacher"] | {"path": str(tmp_path / "none")}}, SPEC, "teacher.path", "not a directory")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_teacher_that_lacks_a_file(job: Json, refused: Callable[..., str], tmp_path: Path, teacher: Path, lost: str) -> None:
    bare = Path(shutil.copytree(teacher, tmp_path / "bare", ignore=shutil.ignore_patterns(lost)))
    refused(job | {"teacher": job["teacher"] | {"path": str(bare)}}, SPEC, "teacher.path", lost.removeprefix("model"))


def test_a_student_that_is_not_there(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    refused(job | {"student": {"kind": "checkpoint", "path": str(tmp_path / "none")}}, SPEC, "student.path", "not a directory")


def test_a_package_that_is_not_installed(job: Json, refused: Callable[..., str]) -> None:
    refused(job | {"teacher": {"kind": "gguf", "package": "no_such_package"}}, ENVIRONMENT, "teacher.package", "not installed")


# Rows.


def test_a_row_without_text(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    """null-text: the fault is named without the machinery that met it."""
    source = {"kind": "jsonl", "paths": [str(cases.null_text(tmp_path / "null.jsonl"))]}
    line = refused(job | {"data": job["data"] | {"source": source}}, DATA, "null.jsonl at byte", "'text' is null")
    assert "UDF" not in line and "Ray" not in line


def test_messages_are_no_text(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    """Chat data: which field is not text, and which could be taken."""
    chat = [{"id": "a", "messages": [{"role": "user", "content": text}]} for text in cases.texts(50)]
    source = {"kind": "jsonl", "paths": [str(cases.write_jsonl(tmp_path / "chat.jsonl", chat))], "field": "messages"}
    said = ("'messages' is a list, not text", "data.source.field", "id", "apply_chat_template")
    refused(job | {"data": job["data"] | {"source": source}}, DATA, *said)
    missing = {"kind": "jsonl", "paths": source["paths"]}
    refused(job | {"data": job["data"] | {"source": missing}}, DATA, "no 'text'", "data.source.field")


# Enough data.


def test_one_document_cannot_be_split(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    """one-document: the message names a way out."""
    source = {"kind": "jsonl", "paths": [str(cases.one_document(tmp_path / "one.jsonl"))]}
    refused(job | {"data": job["data"] | {"source": source}}, DATA, "data.source", "one document", "cut it into parts")


def notes(folder: Path, count: int = 34) -> Json:
    """A job on `count` small files at the defaults of everything else, with a tokenizer that they are enough for."""
    folder.mkdir()
    for number, text in enumerate(cases.texts(count, 1200)):
        (folder / f"{number}.md").write_text(text)
    data = {"source": {"kind": "text", "paths": [f"{folder}/*.md"]}, "tokenizer": {"kind": "train", "vocab_size": 1000}}
    return {"name": "notes", "storage": str(folder.parent / "store"), "data": data, "tracking": {"enabled": False}}


def heldout_count(folder: Path, seed: int, fraction: float = 0.05) -> int:
    """How many files of `folder` are held out, by the rule that tokens are made by."""
    contents = (hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir())
    draws = (hashlib.sha256(f"{seed}:{content}".encode()).digest()[:8] for content in contents)
    return sum(int.from_bytes(draw, "big") < fraction * 2**64 for draw in draws)


def proposed(line: str) -> Json:
    """The value that a message says would work."""
    words = line.replace(",", " ").split()
    key = next(word for word in words[2:] if word.startswith("data."))
    return {key.removeprefix("data."): json.loads(words[words.index(key, 2) + 1])}


def test_few_small_files_are_refused_with_a_value_that_works(tmp_path: Path, refused: Callable[..., str]) -> None:
    """34 markdown files at the defaults: the message names the key, and its value is taken at its word."""
    job = notes(tmp_path / "notes")
    job["data"] |= {"seed": next(seed for seed in range(99) if heldout_count(tmp_path / "notes", seed) == 0)}
    line = refused(job, DATA, "data.heldout_fraction: 0.05 keeps 0 of 34 documents")
    changed = job | {"data": job["data"] | proposed(line)}
    assert not [said for said in found(changed) if said.startswith("refused")]


def test_a_corpus_too_small_for_its_vocabulary(tmp_path: Path, refused: Callable[..., str]) -> None:
    job = notes(tmp_path / "notes")
    del job["data"]["tokenizer"]
    line = refused(job, DATA, "data.tokenizer.vocab_size", "set it to")
    job["data"]["tokenizer"] = {"kind": "train", "vocab_size": int(line.split()[-1])}
    assert not [said for said in found(job) if "vocab_size" in said]


def test_many_passes_are_said(job: Json) -> None:
    (line,) = found(job | {"train": job["train"] | {"steps": 2000}})
    assert line.startswith("warning") and "train.steps: 2000 steps of 8 rows" in line and "passes" in line


# Vocabularies.


def test_more_labels_than_ids(job: Json, refused: Callable[..., str]) -> None:
    """k-above-vocabulary."""
    refused(job | {"labels": {"kind": "topk", "k": 600}}, SPEC, "labels.k", "600", "512")


def test_a_vocabulary_that_is_not_the_teachers(job: Json, refused: Callable[..., str]) -> None:
    student = {"kind": "config", "model": {"type": "llama", "config": cases.SHAPE | {"vocab_size": 600}}}
    refused(job | {"student": student}, SPEC, "student.model.config.vocab_size", "600", "512")


def test_ids_beyond_the_embedding(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    """added-tokens: said where no text holds such a token, refused where one does."""
    added = job | {"teacher": job["teacher"] | {"path": str(cases.added_tokens(tmp_path / "added"))}}
    (line,) = found(added)
    assert line.startswith("warning") and "teacher.path" in line and "513" in line and "'<think>'" in line
    thoughts = cases.write_jsonl(tmp_path / "thoughts.jsonl", [f"<think>{text}</think>" for text in cases.texts(160)])
    source = {"kind": "jsonl", "paths": [str(thoughts)]}
    refused(added | {"data": job["data"] | {"source": source}}, SPEC, "teacher.path", "'<think>'", "512")


def test_features_and_shards_that_the_teacher_cannot_give(job: Json, refused: Callable[..., str]) -> None:
    """Known from the outline of a teacher that is here."""
    kept = job["labels"] | {"features": {"keep": [{"layer": 9}]}}
    refused(job | {"labels": kept}, SPEC, "labels.features", "hidden.9", "2 layers")


# Positions.


def test_positions_that_run_out(job: Json, refused: Callable[..., str], tmp_path: Path) -> None:
    """short-positions: a learned table ends, in a teacher or in a student."""
    short = cases.short_positions(tmp_path / "short")
    line = "data.seq_len: 64, but {} (gpt2) has 32 positions (n_positions); set data.seq_len to 32 or less"
    assert refused(job | {"teacher": job["teacher"] | {"path": str(short)}}, SPEC) == line.format("teacher.path")
    assert refused(job | {"student": {"kind": "checkpoint", "path": str(short)}}, SPEC) == line.format("student.path")
    built = {"kind": "config", "model": {"type": "gpt2", "config": cases.GPT2 | {"n_positions": 32}}}
    assert refused(job | {"student": built}, SPEC) == line.format("student.model")
    assert found(job | {"student": built, "data": job["data"] | {"seq_len": 32}}) == []


@pytest.mark.parametrize("kind", sorted(POSITION_TABLES))
def test_tables_are_those_of_transformers(kind: str) -> None:
    """Any position table: a window of its length passes, one id more does not; a length left out is transformers' own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, default = POSITION_TABLES[kind]
    assert getattr(AutoConfig.for_model(kind), name) == default
    widths = dict.fromkeys(("hidden_size", "n_embd", "emb_dim", "word_embed_proj_dim"), 32)
    depths = dict.fromkeys(("num_layers", "n_layer", "num_hidden_layers", "n_layers"), 1)
    heads = dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4)
    sizes = widths | depths | heads | {"intermediate_size": 64, "ffn_dim": 64, "dff": 64, "rotary_dim": 4, name: 12}
    own = {"gpt_neo": {"attention_types": [[["global"], 1]]}}.get(kind, {})
    known = {key: value for key, value in sizes.items() if hasattr(AutoConfig.for_model(kind), key)}
    config = AutoConfig.for_model(kind, vocab_size=64, **known, **own)
    model = AutoModelForCausalLM.from_config(config).eval()
    model(torch.ones(1, 12, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 13, dtype=torch.long))


def test_rotary_positions_do_not_run_out(job: Json, tmp_path: Path) -> None:
    built = cases.save_model(tmp_path / "rotary", config=cases.LLAMA | {"max_position_embeddings": 32})
    (line,) = found(job | {"teacher": job["teacher"] | {"path": str(built)}})
    assert line.startswith("warning") and "trained for 32 positions" in line


# The machine.


def test_gpus_that_are_not_there(job: Json, refused: Callable[..., str]) -> None:
    line = refused(job | {"train": job["train"] | {"gpus_per_worker": 1}}, ENVIRONMENT, "train.gpus_per_worker", "has none")
    assert "set it to 0" in line
    teacher = job["teacher"] | {"gpus_per_shard": 1}
    refused(job | {"teacher": teacher}, ENVIRONMENT, "teacher.gpus_per_shard", "1 GPU")


def test_workers_that_would_share_a_gpu(job: Json, refused: Callable[..., str]) -> None:
    shared = {"gpus_per_worker": 0.5, "workers": 2}
    refused(job | {"train": job["train"] | shared}, SPEC, "train.gpus_per_worker: 0.5", "NCCL", "2 workers")


def test_gpus_that_are_there(job: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Machine(2, 16 * GIB, 12 * GIB, (Gpu("H100", 80 * GIB),))
    monkeypatch.setattr(checks, "this_machine", lambda: one)
    monkeypatch.setattr(machine, "_torch_build", lambda: "2.13.0+cu130")
    on_gpu = job | {"train": job["train"] | {"gpus_per_worker": 1}}
    assert found(on_gpu) == []
    monkeypatch.setattr(machine, "_torch_build", lambda: "2.13.0+cpu")
    (line,) = found(on_gpu)
    assert line.startswith("refused") and "build without CUDA" in line


def test_more_workers_than_cores_are_said_and_run(job: Json) -> None:
    (line,) = found(job | {"train": job["train"] | {"workers": 8, "micro_batch": 1}})
    assert line.startswith("warning") and "train.workers: 8 workers and 1 teacher replica want 9 cores" in line
    slots = job | {"train": job["train"] | {"workers": 8, "micro_batch": 1}, "cluster": {"num_cpus": 2}}
    (line,) = found(slots)
    assert line.startswith("refused") and "cluster.num_cpus" in line and "9 CPU" in line


def test_memory_that_is_not_there(job: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where model states alone do not fit; said where only what passes through may not."""
    monkeypatch.setattr(checks, "this_machine", lambda: Machine(2, 16 * GIB, GIB // 4, ()))
    (line,) = found(job)
    assert line.startswith("warning") and line.split()[1] == "train:" and "256 MiB" in line
    large = cases.SHAPE | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    lines = found(job | {"student": {"kind": "config", "model": {"type": "llama", "config": large}}})
    assert [line for line in lines if line.startswith("refused") and "optimizer states" in line and "16.0 GiB" in line]


def test_a_disk_that_is_too_small(job: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=400_000))
    (line,) = found(job)
    assert line.startswith("warning") and "storage:" in line and "free" in line
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=40_000))
    (line,) = found(job)
    assert line.startswith("refused") and "trained models" in line


def test_a_folder_too_long_for_sockets(job: Json, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A long TMPDIR: named as what it is, not as a cluster that cannot be reached."""
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)
    refused(job, ENVIRONMENT, "TMPDIR", "RAY_TMPDIR=/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert found(job) == []


def test_another_machine_is_not_judged_by_this_one(job: Json) -> None:
    there = {
        "train": job["train"] | {"gpus_per_worker": 1, "workers": 8, "micro_batch": 1},
        "cluster": {"address": "head:6379"},
    }
    assert found(job | there) == []


# How it is shown.


def test_plan_shows_findings_and_passes(job: Json, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` shows the plan whatever it finds, and names the parameters where the teacher is here."""
    file = write_job(job | {"train": job["train"] | {"workers": 8, "micro_batch": 1}})
    code, shown, _ = cli(monkeypatch, capsys, "plan", file)
    assert code == 0 and "\nwarning  train.workers" in shown and "160 documents" in shown and "passes" in shown
    assert "not known" not in shown
    code, shown, _ = cli(monkeypatch, capsys, "plan", file, "--json", "-c", "labels.kind=topk", "-c", "labels.k=600")
    findings = json.loads(shown)["findings"]
    assert code == SPEC and [(f["key"], f["refused"]) for f in findings] == [("labels.k", True), ("train.workers", False)]


def test_warnings_are_kept_for_the_report(job: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import pipeline

    kept: list[str] = []

    class Opened:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def warn(self, text: str) -> None:
            kept.append(text)
            raise DistillError("far enough")

    monkeypatch.setattr(pipeline, "open_run", lambda *_: Opened())
    eight = job | {"train": job["train"] | {"workers": 8, "micro_batch": 1}}
    with pytest.raises(DistillError, match="far enough"):
        pipeline.run(make_plan(load_job(write_job(eight))))
    assert kept and kept[0].startswith("train.workers: 8 workers")
