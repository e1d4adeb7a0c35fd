"""Everything that can be typed or written wrongly, as two tables: slips on the command line, and errors in what it is given.

Each row: what is wrong, how it ends, and words of the one line that says what is wrong and what to do next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator.cli import main
from orchestrator.errors import MAX_MESSAGE_CHARS
from tests.field import cases
from tests.tiny import Json

PREFIX = "distill: "
MACHINERY = ("Traceback", "pydantic", "click", "typer", "ray.", "UDF", "Errno", "object at 0x")
USAGE, DATA, ENVIRONMENT = 2, 3, 4
JOB = "jobs/quickstart.yaml"
SHORT: Json = {"kind": "config", "model": {"type": "gpt2", "config": cases.GPT2 | {"n_positions": 32}}}
ROOT = Path(__file__).parents[2]


class Slip(NamedTuple):
    args: str
    words: tuple[str, ...]
    code: int = USAGE


def slip(args: str, *words: str, code: int = USAGE) -> Slip:
    return Slip(args, words, code)


SLIPS = [
    # Verbs that are not there.
    slip("rnu", "rnu: no such command", "did you mean run?"),
    slip("paln x.yaml", "paln", "did you mean plan?"),
    slip("statsu", "did you mean status?"),
    slip("doctr", "did you mean doctor?"),
    slip("reprot x", "did you mean report?"),
    slip("sumbit x.yaml", "did you mean submit?"),
    slip("Run x.yaml", "did you mean run?"),
    slip("xyzzy", "xyzzy: no such command", "distill -h"),
    slip("xyz --nope", "no such command", "distill -h"),
    slip("help", "help: no such command", "distill -h"),
    slip("version", "version: no such command", "distill -h"),
    slip("verify LOG", "did you mean distill labels verify?"),
    slip("repair LOG", "did you mean distill labels repair?"),
    slip("inspect LOG", "did you mean distill labels inspect?"),
    slip("install DIR", "did you mean distill dashboards install?"),
    slip("job.yaml", "did you mean distill run job.yaml?"),
    slip(JOB, f"did you mean distill run {JOB}?"),
    slip("label verify x", "did you mean labels?"),
    slip("labels verfy x", "labels: verfy: no such command", "did you mean verify?"),
    slip("labels run x", "did you mean distill run?"),
    slip("labels bogus", "distill labels -h"),
    slip("dashboards instal x", "did you mean install?"),
    # Options that are not there.
    slip("--vresion", "no option --vresion", "did you mean --version?"),
    slip("--hlep", "did you mean --help?"),
    slip("-x", "no option -x", "distill -h"),
    slip("-q run x.yaml", "no option -q", "distill -h"),
    slip("run --nope x.yaml", "run: no option --nope", "distill run -h"),
    slip("run --dry-ru x.yaml", "did you mean --dry-run?"),
    slip("run --dryrun x.yaml", "did you mean --dry-run?"),
    slip("run --jsn x.yaml", "did you mean --json?"),
    slip("run --verbos x.yaml", "did you mean --verbose?"),
    slip("run -z x.yaml", "run: no option -z", "distill run -h"),
    slip("plan --clutser 8xH100 x.yaml", "did you mean --cluster?"),
    slip("labels --all", "labels: no option --all", "distill labels -h"),
    slip("labels repair --dry x", "did you mean --dry-run?"),
    slip("stop --adress h:1 x", "did you mean --address?"),
    slip("logs --folow x", "did you mean --follow?"),
    # Words that are missing.
    slip("run", "run needs JOB", "distill run jobs/quickstart.yaml", "distill init"),
    slip("run --dry-run", "run needs JOB", "distill init"),
    slip("plan", "plan needs JOB", "distill init"),
    slip("submit", "submit needs JOB", "distill init"),
    slip("stop", "stop needs ID", "distill list"),
    slip("logs -f", "logs needs ID", "distill list"),
    slip("report", "report needs RUN", "for example distill report"),
    slip("compare", "compare needs RUN", "for example distill compare"),
    slip("compare one", "compare: give at least two runs"),
    slip("sweep x.yaml", "sweep needs --grid", "--grid KEY=a,b,c"),
    slip("labels verify", "labels verify needs LOG", "STORAGE/labels/KEY"),
    slip("labels inspect", "labels inspect needs LOG", "STORAGE/labels/KEY"),
    slip("labels repair --dry-run", "labels repair needs LOG"),
    slip("dashboards install", "dashboards install needs DIR", "for example"),
    slip("run x.yaml --set", "--set needs a value", "--set a.b=c"),
    slip("run x.yaml -c", "-c needs a value", "-c a.b=c"),
    slip("plan x.yaml --price", "--price needs a value", "distill plan -h"),
    slip("plan x.yaml --tflops 1", "--tflops needs 2 values", "distill plan -h"),
    slip("list --address", "--address needs a value", "distill list -h"),
    # Words too many.
    slip("run a.yaml b.yaml", "b.yaml is one word too many", "distill run JOB"),
    slip("run x.yaml train.steps=3", "did you mean --set train.steps=3?"),
    slip("stop a b", "b is one word too many", "distill stop ID"),
    slip("schema x", "x is one word too many", "distill schema"),
    slip("list mine", "mine is one word too many"),
    slip("run x.yaml --json=1", "--json takes no value", "write --json alone"),
    # Values that are none.
    slip(f"plan {JOB} --price abc", "--price must be a number", "abc"),
    slip(f"plan {JOB} --tflops 1 b", "--tflops must be a number", "b"),
    slip(f"plan {JOB} --price 3", "--price needs --cluster", "--cluster 8xH100"),
    slip(f"plan {JOB} --calibrate", "--calibrate needs --cluster"),
    slip(f"plan {JOB} --cluster 8xH100 --price -1", "--price must be 0 or more"),
    slip(f"plan {JOB} --cluster 8xH100 --price nan", "--price must be 0 or more"),
    slip(f"plan {JOB} --cluster 8xH100 --tflops 0 1", "--tflops", "above 0"),
    slip(f"plan {JOB} --cluster 8", "cluster", "128xH100"),
    slip(f"plan {JOB} --cluster 8xH1000", "cluster", "known are", "H100"),
    slip(f"plan {JOB} --cluster 0xH100", "cluster", "no devices"),
    slip("run nowhere.yaml", "nowhere.yaml: no such file", "distill init"),
    slip("run jobs", "jobs: is a directory", "job file"),
    slip("doctor nowhere.yaml", "nowhere.yaml: no such file", "distill init"),
    slip(f"run {JOB} --set train", "--set train", "KEY=VALUE", "train.steps=100"),
    slip(f"run {JOB} --set train.stepz=3", "train.stepz", "did you mean steps?"),
    slip(f"run {JOB} --set trian.steps=3", "trian", "did you mean train?"),
    slip(f"run {JOB} --set train.steps=many", "train.steps", "must be a whole number"),
    slip(f"run {JOB} --set train.steps=-1", "train.steps", "must be"),
    slip(f"sweep {JOB} --grid objective.alpha", "--grid", "KEY=a,b,c"),
    slip("labels verify nowhere", "not a label log", "STORAGE/labels/KEY"),
    slip("report nowhere", "nowhere: no such run", "--storage"),
    slip("list --address ray://h:1", "--address", "host:port"),
]


def say(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `distill ARGS` in this process, in which starting Ray is an error."""

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("orchestrator.run.opening.ray_session", no_ray)
    monkeypatch.setattr(sys, "argv", ["distill", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main()
    said = capsys.readouterr()
    return int(ending.value.code or 0), said.out, said.err


def judge(outcome: tuple[int, str, str], code: int, words: tuple[str, ...]) -> None:
    ended, out, err = outcome
    assert ended == code, err
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith(PREFIX) and len(err) <= len(PREFIX) + MAX_MESSAGE_CHARS + 1
    for word in words:
        assert word in err
    for word in MACHINERY:
        assert word not in err


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.args)
def test_a_slip_on_the_command_line(slip: Slip, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    judge(say(slip.args.split(), monkeypatch, capsys), slip.code, slip.words)


def test_the_tables_are_long_enough() -> None:
    assert len({s.args for s in SLIPS}) == len(SLIPS) >= 60
    assert len({e.what for e in ERRORS}) == len(ERRORS) >= 40


# What is asked for rightly.


@pytest.mark.parametrize("args", ["", "-h", "--help", "labels", "labels -h", "dashboards", "run -h", "run --help", "stop -h"])
def test_help(args: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(args.split(), monkeypatch, capsys)
    assert (code, err) == (0, "") and out.startswith("Usage: distill") and "-h, --help" in out


@pytest.mark.parametrize("module", ["orchestrator", "orchestrator.cli"])
def test_version_in_a_process(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("distill ") and done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize("args", ["rnu", "run", "plan x.yaml --price abc", "run nowhere.yaml"])
def test_a_slip_in_a_process(args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "orchestrator", *args.split()], capture_output=True, text=True, check=False)
    judge((done.returncode, done.stdout, done.stderr), USAGE, ())


def test_a_shell_completes_verbs_options_and_keys() -> None:
    def completed(words: str) -> list[str]:
        env = {"_DISTILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "orchestrator"]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
        return done.stdout.split()

    assert completed("distill la") == ["labels"]
    assert "--dry-run" in completed("distill run --d")
    assert {"train.steps=", "train.global_batch="} <= set(completed("distill run x.yaml --set train."))


# What a job says, and what it names.


class Wrong(NamedTuple):
    what: str
    change: Any
    """Sections of the job that are put in its place, or the text of the whole file."""
    words: tuple[str, ...]
    code: int = USAGE


def wrong(what: str, change: Any, *words: str, code: int = USAGE) -> Wrong:
    return Wrong(what, change, words, code)


def source(kind: str, *paths: str, **more: Any) -> Json:
    """A change of the data's source; FOLDER stands for the folder of the corpora."""
    return {"data.source": {"kind": kind, "paths": [f"FOLDER/{path}" for path in paths], **more}}


ERRORS = [
    # The file itself.
    wrong("an empty file", "", "mapping of keys"),
    wrong("a list", "- a\n", "mapping of keys"),
    wrong("no YAML", "name: [a\n", "job.yaml:"),
    wrong("a tab", "name: a\n\tstorage: b\n", "job.yaml:2", "tab"),
    wrong("a key twice", "name: a\nname: b\n", "job.yaml:2", "name"),
    wrong("a byte order mark", "\ufeffname: a\n", "byte order mark", "save it as UTF-8 without one"),
    wrong("a variable that is not set", {"storage": "${oc.env:DISTILL_NOT_SET}"}, "storage", "DISTILL_NOT_SET is not set"),
    # Keys and values.
    wrong("no name", {"name": None}, "name", "required"),
    wrong("a name that is a path", {"name": "../x"}, "name", "../x"),
    wrong("a misspelt section", {"traim": {}}, "traim", "did you mean train?"),
    wrong("a misspelt key", {"train.stepss": 3}, "train.stepss", "did you mean steps?"),
    wrong("a misspelt kind", {"labels": {"kind": "topkk"}}, "labels.kind", "did you mean topk?"),
    wrong("text for a number", {"train.steps": "many"}, "train.steps", "must be a whole number"),
    wrong("steps below one", {"train.steps": 0}, "train.steps", "must be"),
    wrong("a share above one", {"data.heldout_fraction": 1.5}, "data.heldout_fraction", "must be below 1"),
    wrong("alpha above one", {"objective.alpha": 2}, "objective.alpha", "must be at most 1"),
    wrong("an unknown precision", {"train.precision": "fp12"}, "train.precision", "must be", "bf16"),
    wrong("a batch that does not divide", {"train.global_batch": 7}, "train", "7 rows", "micro_batch 4"),
    wrong("a warmup longer than the training", {"train.warmup_steps": 50}, "warmup_steps 50 exceeds steps 12"),
    wrong("a temperature without labels", {"objective.temperature": 3.0}, "objective.temperature", "labels.temperatures"),
    wrong("features that are not kept", {"objective.features": [{"kind": "mse", "weight": 1.0}]}, "objective.features"),
    # Data.
    wrong("a file that is not there", source("text", "nowhere.txt"), "data.source.paths", "nowhere.txt", code=DATA),
    wrong("a glob without a file", source("text", "*.nothing"), "data.source.paths", "*.nothing", code=DATA),
    wrong("a row without text", source("jsonl", "null.jsonl"), "null.jsonl at byte", "null", "take such rows out", code=DATA),
    wrong("another column", source("jsonl", "base.jsonl", field="body"), "no", "body", code=DATA),
    wrong("a line that is no JSON", source("jsonl", "broken.jsonl"), "broken.jsonl at byte 0", "not a JSON line", code=DATA),
    wrong("a number for a document", source("jsonl", "number.jsonl"), "number.jsonl at byte 0", "as one text", code=DATA),
    wrong(
        "chat messages",
        source("jsonl", "chat.jsonl", field="messages"),
        "chat.jsonl at byte 0",
        "apply_chat_template",
        code=DATA,
    ),
    wrong("an empty corpus", source("text", "empty.txt"), "data.source", "empty", code=DATA),
    wrong("one document", source("jsonl", "one.jsonl"), "one document", code=DATA),
    wrong("bytes that are no text", source("text", "latin.txt"), "latin.txt", "not UTF-8", "data.undecodable", code=DATA),
    wrong("no Parquet", source("parquet", "base.jsonl"), "base.jsonl", "not a readable Parquet file", code=DATA),
    # Models.
    wrong("no teacher", {"teacher.path": "FOLDER/nobody"}, "teacher.path", "nobody"),
    wrong("a teacher without tokenizer", {"teacher.path": "FOLDER/bare"}, "teacher.path", "tokenizer.json"),
    wrong("a teacher without weights", {"teacher.path": "FOLDER/weightless"}, "teacher.path", "model.safetensors"),
    wrong("a teacher without configuration", {"teacher.path": "FOLDER/shapeless"}, "teacher.path", "config.json"),
    wrong("no student", {"student": {"kind": "checkpoint", "path": "FOLDER/nobody"}}, "student.path", "nobody"),
    wrong("an unknown type", {"student.model.type": "llamma"}, "student.model.type", "llamma"),
    wrong("another vocabulary", {"student.model.config.vocab_size": 600}, "vocab_size", "600", "512"),
    wrong("more labels than ids", {"labels": {"kind": "topk", "k": 600}}, "labels.k", "600", "512"),
    wrong("windows beyond the positions", {"student": SHORT}, "data.seq_len", "64", "32"),
    wrong("a package that is not there", {"teacher": {"kind": "package", "package": "no-such"}}, "teacher"),
    # Machine, storage, tracking, cluster.
    wrong("GPUs that are not there", {"train.gpus_per_worker": 1}, "train.gpus_per_worker", code=ENVIRONMENT),
    wrong("a storage of another kind", {"storage": "gs://bucket/folder"}, "storage", "s3://"),
    wrong("a storage that is a file", {"storage": "FOLDER/empty.txt"}, "empty.txt", code=ENVIRONMENT),
    wrong("a storage that cannot be made", {"storage": "/proc/no/store"}, "/proc/no/store", code=ENVIRONMENT),
    wrong("an address that is none", {"cluster.address": 3}, "cluster.address", "must be text"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora and teachers, good and broken."""
    folder = tmp_path_factory.mktemp("inputs")
    base = cases.save_model(folder / "teacher")
    for name, lost in (("bare", "tokenizer.json"), ("weightless", "model.safetensors"), ("shapeless", "config.json")):
        (cases.copied(base, folder / name) / lost).unlink()
    cases.write_jsonl(folder / "base.jsonl", cases.texts(160))
    cases.write_jsonl(folder / "chat.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in cases.texts(20)])
    cases.write_jsonl(folder / "number.jsonl", [{"text": 3}] * 20)
    cases.null_text(folder / "null.jsonl")
    cases.one_document(folder / "one.jsonl")
    (folder / "broken.jsonl").write_text("{'text': 'single quotes'}\n")
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"plain text and then caf\xe9\n" * 200)
    return folder


def changed(job: Json, change: Json) -> Json:
    """`job` with the dotted keys of `change`; None takes a key away."""
    job = json.loads(json.dumps(job))
    for key, value in change.items():
        *sections, last = key.split(".")
        section = job
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
        if value is None:
            del section[last]
    return job


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.what.replace(" ", "-"))
def test_an_error_of_the_users(
    error: Wrong, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said by `run` before it starts Ray."""
    good = cases.field_job(tmp_path, "case", folder / "teacher", folder / "base.jsonl")
    text = error.change if isinstance(error.change, str) else json.dumps(changed(good, error.change))
    (tmp_path / "job.yaml").write_text(text.replace("FOLDER", str(folder)))
    monkeypatch.chdir(tmp_path)
    judge(say(["run", "job.yaml"], monkeypatch, capsys), error.code, error.words)


def test_the_job_itself_is_good(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: unchanged, it is refused for nothing and gets as far as Ray."""
    good = cases.field_job(tmp_path, "case", folder / "teacher", folder / "base.jsonl")
    (tmp_path / "job.yaml").write_text(json.dumps(good))
    code, _, err = say(["run", str(tmp_path / "job.yaml")], monkeypatch, capsys)
    assert code == 1 and "AssertionError: Ray was started" in err
