"""Job files: what they may hold, and the one line that each wrong one is answered with."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import EnvironmentFault, SpecError
from orchestrator.spec.data import Data, TeacherTokenizer, TextSource
from orchestrator.spec.job import Job, Tracking
from orchestrator.spec.labels import TopkLabels
from orchestrator.spec.load import MAX_BYTES, job_schema, load_job, resolved_yaml
from orchestrator.spec.model import ConfigStudent, Model, PretrainTeacher, Replicas, TransformersTeacher
from orchestrator.spec.objective import Objective
from orchestrator.spec.train import Train

ROOT = Path(__file__).parent.parent.parent

FILE = "jobs/x.yaml"

in_shared_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()


def load(text: str | bytes, *overrides: str) -> Job:
    Path(FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job(FILE, overrides)


def refusal(text: str | bytes, *overrides: str) -> str:
    """The message that the job file `text` is refused with: one short printable line, within a second."""
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message) <= 300
    assert message.isprintable()
    return message


# YAML.

QUIRKS = {
    "empty": ("", "jobs/x.yaml: a job file must be a mapping of keys, got nothing"),
    "comment": ("# nothing yet\n", "jobs/x.yaml: a job file must be a mapping of keys, got nothing"),
    "list at the top": ("- name: a\n", 'jobs/x.yaml: a job file must be a mapping of keys, got [{"name": "a"}]'),
    "number at the top": ("5", "jobs/x.yaml: a job file must be a mapping of keys, got 5"),
    "duplicate key": ("name: a\nseed: 1\nname: b", "jobs/x.yaml:3: name: duplicate key, first at jobs/x.yaml:1"),
    "nested duplicate": ("train:\n  steps: 1\n  steps: 1", "jobs/x.yaml:3: train.steps: duplicate key, first at jobs/x.yaml:2"),
    "tab": ("name: a\ntrain:\n\tsteps: 1", "jobs/x.yaml:3:1: a tab cannot indent; use spaces"),
    "BOM": (b"\xef\xbb\xbfname: a", "jobs/x.yaml:1:1: starts with a byte order mark; save it as UTF-8 without one"),
    "Latin-1": (b"name: a\nstorage: caf\xe9\n", "jobs/x.yaml:2: byte 0xe9 is not UTF-8"),
    "UTF-16": ("name: a".encode("utf-16"), "jobs/x.yaml:1: byte 0xff is not UTF-8"),
    "NUL": ("name: a\nstorage: b\0c", "jobs/x.yaml:2: character U+0000 is not allowed in YAML"),
    "ESC": ("name: \x1b[31m", "jobs/x.yaml:1: character U+001B is not allowed in YAML"),
    "escaped NUL": ('name: a\nstorage: "b\\0c"', "jobs/x.yaml:2:10: character U+0000 is not allowed in text"),
    "escaped surrogate": ('name: "\\ud800"', "jobs/x.yaml:1:7: character U+D800 is not allowed in text"),
    "escape beyond Unicode": ('name: "\\UFFFFFFFF"', "jobs/x.yaml: an escape sequence stands for no character"),
    "anchor": ("a: &x [1]\nb: 2", "jobs/x.yaml:1:4: anchors (&) are not allowed; quote text that starts with &"),
    "alias": ("a: *x", "jobs/x.yaml:1:4: aliases (*) are not allowed; quote text that starts with *"),
    "glob": ("a: [*.txt]", "jobs/x.yaml:1:5: aliases (*) are not allowed; quote text that starts with *"),
    "python tag": ("a: !!python/object/apply:os.system [id]", "jobs/x.yaml:1:4: tags (!) are not allowed"),
    "plain tag": ("a: !x 1", "jobs/x.yaml:1:4: tags (!) are not allowed; quote text that starts with !"),
    "merge key": ("name: a\n<<: {seed: 1}", "jobs/x.yaml:2: <<: unknown key"),
    "two documents": ("name: a\n---\nname: b", "jobs/x.yaml:2:1: a second document starts here; one file is one job"),
    "key is a list": ("? [a]\n: 1", "jobs/x.yaml:1:3: a key must be plain text"),
    "open list": ("name: a\ndata: [1", "jobs/x.yaml:2:9: expected ',' or ']'"),
    "open quote": ("name: 'a", "jobs/x.yaml:1:9: found unexpected end of stream while scanning a quoted scalar"),
    "two colons": ("name: a: b", "jobs/x.yaml:1:8: mapping values are not allowed here"),
    "3000 deep": ("a: " + "[" * 3000, "jobs/x.yaml:1: nested more than 50 levels deep"),
    "300 deep in lines": ("\n".join(" " * n + "a:" for n in range(300)), "nested more than 50 levels deep"),
    "many values": ("a: [" + "1," * 100_000, "more than 5000 values"),
    "large": ("#" * (MAX_BYTES + 1), f"jobs/x.yaml: larger than {MAX_BYTES} bytes, which no job needs"),
    "long folded text": ("a: " + "x y " * (MAX_BYTES // 4 - 1), "jobs/x.yaml:1: a: unknown key"),
    "long block text": ("a: |\n" + " x\n" * (MAX_BYTES // 3 - 2), "jobs/x.yaml:1: a: unknown key"),
    "empty lines": ("\n" * MAX_BYTES, "a job file must be a mapping of keys, got nothing"),
    "infinite": ("train: {learning_rate: .inf}", "jobs/x.yaml:1:24: .inf is not a finite number"),
    "beyond double": ("train: {learning_rate: 1e999}", "jobs/x.yaml:1:24: 1e999 is not a finite number"),
    "5000 digits": ("name: a\nseed: " + "1" * 5000, 'jobs/x.yaml:2: seed: must be a whole number, got "1111'),
    "almost a number": ("name: a\nseed: " + "1" * (MAX_BYTES - 20) + "x", 'seed: must be a whole number, got "1111'),
    "many interpolations": ("name: " + "${oc.env:A}" * 20_000, "jobs/x.yaml:1:7: text with interpolations may have 1000"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), QUIRKS.values(), ids=QUIRKS.keys())
def test_yaml_quirk_is_refused(text: str | bytes, expected: str) -> None:
    assert expected in refusal(text)


def test_alias_bomb_is_refused_before_it_unfolds() -> None:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    assert "jobs/x.yaml:1:5: anchors (&)" in refusal("a0: &a0 [1, 1, 1]\n" + levels)


def test_numbers_follow_yaml_1_2() -> None:
    job = load("name: a\ntrain: {learning_rate: 1e-5, weight_decay: 1, grad_clip: .5, global_batch: 1_024}")
    assert (job.train.learning_rate, job.train.weight_decay, job.train.grad_clip) == (1e-5, 1.0, 0.5)
    assert job.train.global_batch == 1024


@pytest.mark.parametrize("value", ["2024-01-01", "1:30", "no", "0x1F", "=", "a # b", "'5'", '"\\u00e9"', "C:\\x"])
def test_text_stays_text(value: str) -> None:
    storage = load(f"name: a\nstorage: {value}").storage
    assert storage == {"a # b": "a", "'5'": "5", '"\\u00e9"': "é"}.get(value, value)


def test_yaml_1_1_directive_changes_nothing() -> None:
    job = load("%YAML 1.1\n---\nname: no\ntrain: {learning_rate: 1e-5}")
    assert (job.name, job.train.learning_rate) == ("no", 1e-5)


def test_forty_levels_are_fine() -> None:
    deep = "{a: " * 40 + "1" + "}" * 40
    job = load(f"name: a\nstudent: {{model: {{config: {deep}}}}}", "seed=3")
    assert str(job.student.model.config).count("a") == 40


# The file itself.


@pytest.mark.parametrize("path", ["nope.yaml", "jobs/x.yaml/y", "a\0b", "x" * 200 + ".yaml"])
def test_missing_file(path: str) -> None:
    load("name: a")
    with pytest.raises(SpecError, match="no such file"):
        load_job(path)


def test_directory_is_no_job_file() -> None:
    with pytest.raises(SpecError, match=r"^jobs: is a directory"):
        load_job("jobs")


def test_unreadable_file_is_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFault, match=r"^jobs/x\.yaml: cannot be read: Permission denied$"):
        load_job(FILE)


# What the keys hold.

MISTAKES = {
    "name: a\ntrain:\n  learning_rte: 1": "jobs/x.yaml:3: train.learning_rte: unknown key, did you mean learning_rate?",
    "nmae: a": "jobs/x.yaml:1: nmae: unknown key, did you mean name? (and 1 more)",
    "seed: 1": "jobs/x.yaml: name: missing, but required",
    "name: a\nexport: {zzz: 1}": "jobs/x.yaml:2: export.zzz: unknown key; known are directory",
    "name: a\ntrain:\n  steps: 1.5": "jobs/x.yaml:3: train.steps: must be a whole number, got 1.5",
    "name: a\ntrain:\n  steps: true": "jobs/x.yaml:3: train.steps: must be a whole number, got true",
    "name: a\ntrain:\n  steps: 0": "jobs/x.yaml:3: train.steps: must be at least 1, got 0",
    "name: a\ntrain: {learning_rate: '1e-5'}": 'jobs/x.yaml:2: train.learning_rate: must be a number, got "1e-5"',
    "name: a\ntrain: {schedule: cosin}": "train.schedule: must be 'constant', 'linear', 'cosine' or 'wsd', got \"cosin\"",
    "name: a\ntrain:\n  betas:\n  - 0.9\n  - x": 'jobs/x.yaml:5: train.betas.1: must be a number, got "x"',
    "name: a\ntrain: {betas: 0.9}": "jobs/x.yaml:2: train.betas: must be a list, got 0.9",
    "name: a\ntrain:": "jobs/x.yaml:2: train: must be a section of keys, got nothing",
    "name: a\nevaluate: {baseline: yes}": 'jobs/x.yaml:2: evaluate.baseline: must be true or false, got "yes"',
    "name: 2024": "jobs/x.yaml:1: name: must be text, got 2024",
    "name: a\nteacher:\n  kind: transfomers": (
        "jobs/x.yaml:3: teacher.kind: must be one of gguf, pretrain, transformers, "
        'got "transfomers", did you mean transformers?'
    ),
    "name: a\nteacher:\n  kind: transformers": "jobs/x.yaml:2: teacher.path: missing, but required",
    "name: a\nteacher: {kind: pretrain, pretrain: 1}": "jobs/x.yaml:2: teacher.pretrain: unknown key for kind pretrain",
    "name: a\nteacher:\n  path: /x": "jobs/x.yaml:3: teacher.path: unknown key for kind pretrain",
    "name: a\nteacher:\n  train:\n    steps: x": 'jobs/x.yaml:4: teacher.train.steps: must be a whole number, got "x"',
    "name: a\nteacher: {replicas: {min: 3}}": "jobs/x.yaml:2: teacher.replicas: min 3 is above max 1",
    "name: a\nteacher: {kind: gguf}": "jobs/x.yaml:2: teacher: give either file or package",
    "name: a\nteacher: {cpus_per_replica: 2}": "cpus_per_replica: unknown key for kind pretrain, did you mean cpus_per_",
    "name: a\ndata: {tokenizer: {kind: teacher}}\nteacher: {kind: transformers, path: x, vllm: {url: 'http://h:8000'}}": (
        "labels: teacher.vllm tells top ids alone: kind topk, temperatures [1.0], no features"
    ),
    "name: a\nteacher: {kind: transformers, path: x, vllm: {url: 'http://u:p@h:8000'}}": "jobs/x.yaml:2: teacher.vllm.url",
    "name: a\nteacher: {gpus_per_shard: 8}": "jobs/x.yaml:2: teacher.gpus_per_shard: must be at most 1.0, got 8",
    "name: a\nteacher: {shards: 2, gpus_per_shard: 0.5}": "jobs/x.yaml:2: teacher: gpus_per_shard 0.5: shards exchange through",
    "name: a\nteacher: {shards: 2}\nlabels: {features: {keep: [{layer: 1}, {layer: 2, part: keys}]}}": (
        "labels.features.keep: keys.2 is spread over teacher.shards; hidden and ffn can be kept"
    ),
    "name: a\ntrain:\n  steps: 50\n  workers: 3": ("jobs/x.yaml:4: train: global_batch 16 does not divide among 3 workers"),
    "name: a\nobjective:\n  temperature: 3": ("jobs/x.yaml:3: objective.temperature 3.0 is not in labels.temperatures [1.0]"),
    f"name: a\n{'x' * 300}: 1": f"jobs/x.yaml:2: {'x' * 39}…: unknown key",
    f"name: a\nstorage: 1\n{'y' * 100}: {'z' * 900}": f"jobs/x.yaml:3: {'y' * 39}…: unknown key",
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items())
def test_mistake_is_named(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_first_of_several_problems_is_named() -> None:
    message = refusal("name: A\ntrain: {steps: x, workers: 0, bogus: 1}\ncluster: {bogus: 1}")
    assert message.startswith("jobs/x.yaml:2: train.bogus: unknown key")
    assert message.endswith(" (and 4 more)")


def test_long_path_keeps_its_end() -> None:
    path = Path(*["d" * 50] * 6, "job.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("name: a\nseed: x")
    with pytest.raises(SpecError, match=r"^…d+/d+/job\.yaml:2: seed: must be a whole number") as caught:
        load_job(path)
    assert len(str(caught.value)) <= 300


BAD_NAMES = [
    "../..",
    "..",
    ".",
    "/",
    "a/b",
    "\x1b[31m",
    "\0",
    "a" * 64,
    "a" * 300,
    "A",
    "ä",
    "a b",
    "a\n",
    "",
    "-a",
    "a\u202eb",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_name_is_refused(name: str) -> None:
    escaped = "".join(f"\\U{ord(c):08x}" for c in name)
    refusal(f'name: "{escaped}"')
    refusal(f'name: "{name}"')
    refusal("name: a", f'name="{escaped}"')


@settings(in_shared_folder, max_examples=25)
@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True))
def test_good_name_is_taken(name: str) -> None:
    assert load(f"name: '{name}'").name == name


def test_default_kind_may_be_left_out() -> None:
    job = load("name: a\nlabels: {samples: 20}\ndata: {tokenizer: {vocab_size: 512}}")
    assert job == load("name: a\nlabels: {kind: sampled, samples: 20}\ndata: {tokenizer: {kind: train, vocab_size: 512}}")


# Overrides.


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    job = load(
        "name: a\ntrain: {steps: 5, betas: [0.5, 0.6]}",
        *("train.steps=50", "train.steps=60", "train.learning_rate=1e-5", "train.betas.1=0.7", "tracking.uri=null"),
        *("evaluate.baseline=false", "labels.temperatures=[1, 2]", "labels.samples=20", "storage=a=b"),
    )
    assert (job.train.steps, job.train.learning_rate, job.train.betas) == (60, 1e-5, (0.5, 0.7))
    assert (job.evaluate.baseline, job.labels.temperatures, job.storage) == (False, (1.0, 2.0), "a=b")


@pytest.mark.parametrize("reverse", [False, True])
def test_override_of_a_kind_keeps_what_both_kinds_know(reverse: bool) -> None:
    overrides = ["teacher.kind=transformers", "teacher.path=/x", "data.tokenizer.kind=teacher"]
    text = "name: a\ndata: {tokenizer: {vocab_size: 500}}\nteacher: {kind: pretrain, seed: 3, dtype: fp32, train: {steps: 30}}"
    job = load(text, *(reversed(overrides) if reverse else overrides))
    assert job.teacher == TransformersTeacher(kind="transformers", path="/x", dtype="fp32")


def test_override_of_a_section_replaces_it() -> None:
    job = load("name: a\ndata: {source: {kind: jsonl, paths: [a], field: x}}", "data.source={kind: text, paths: [b]}")
    assert job.data.source == TextSource(kind="text", paths=("b",))


OVERRIDES = {
    "train.foo=1": "--set train.foo=1: train.foo: unknown key; known are epochs, steps",
    "trian.steps=1": "--set trian.steps=1: trian: unknown key, did you mean train?",
    "train.steps=x": '--set train.steps=x: train.steps: must be a whole number, got "x"',
    "train.steps=": "--set train.steps=: train: steps is null and epochs is not given; give one of them",
    "train.steps.x=1": '--set train.steps.x=1: train.steps: must be a whole number, got {"x": 1}',
    "train.betas.7=1": "--set train.betas.7=1: train.betas.7: no such list item",
    "train.betas.x=1": "--set train.betas.x=1: train.betas.x: no such list item",
    "train.workers=3": "--set train.workers=3: train: global_batch 16 does not divide among 3 workers",
    "objective.temperature=2": "--set objective.temperature=2: objective.temperature 2.0 is not in labels.temperatures",
    "teacher.kind=gguv": "--set teacher.kind=gguv: teacher.kind: must be one of gguf, pretrain, transformers, got",
    "teacher.kind=transformers": "--set teacher.kind=transformers: teacher.path: missing, but required",
    "data.source={kind: text, paths: [*.txt]}": "aliases (*) are not allowed; quote text that starts with *",
    "train.steps=[1": "--set train.steps=[1: expected ',' or ']'",
    "train": "--set train: expected KEY=VALUE",
    "=3": "--set =3: expected KEY=VALUE",
    "a..b=3": "--set a..b=3: expected KEY=VALUE",
    "a." * 3000 + "b=1": "expected KEY=VALUE",
    "name=" + "[" * 3000: "nested more than 50 levels deep",
    "name=\0": "character U+0000 is not allowed in YAML",
    "name=" + "x" * 3000: "name: must match",
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items(), ids=[key[:30] for key in OVERRIDES])
def test_wrong_override_is_named(override: str, expected: str) -> None:
    text = "name: a\ntrain: {steps: 50, global_batch: 16, betas: [0.5, 0.6]}"
    assert expected in refusal(text, "seed=1", override, "cluster.num_cpus=2")


# The environment.


def test_environment_variables_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.setenv("TRICKY", "${oc.env:WHERE}")
    monkeypatch.delenv("ABSENT", raising=False)
    job = load(
        "name: a\nstorage: ${oc.env:WHERE}/store\nexport: {directory: '${oc.env:ABSENT,/out}'}\ncluster: {address: '\\${x}'}",
        "tracking.uri=${oc.env:TRICKY}",
    )
    assert (job.storage, job.export.directory, job.cluster.address) == ("/data/store", "/out", "${x}")
    assert job.tracking.uri == "${oc.env:WHERE}"
    assert load("name: a\nstorage: ${oc.env:ABSENT}", "storage=b").storage == "b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nstorage: ${oc.env:ABSENT}", "jobs/x.yaml:2: storage: environment variable ABSENT is not set"),
        ("name: a\nstorage: ${name}", "jobs/x.yaml:2:10: only ${oc.env:VARIABLE} can be interpolated"),
        ("name: a\nstorage: ${oc.decode:1}", "jobs/x.yaml:2:10: only ${oc.env:VARIABLE} can be interpolated"),
        ("name: a\nstorage: '${oc.env:A,${oc.create:1}}'", "only ${oc.env:VARIABLE} can be interpolated"),
        ("name: a\nstorage: '${oc.env:'", "jobs/x.yaml:2:10: malformed interpolation"),
        ("name: a\nstorage: '${oc.env:A,B,C}'", "jobs/x.yaml:2: storage: malformed"),
    ],
)
def test_wrong_interpolation_is_named(text: str, expected: str) -> None:
    assert expected in refusal(text)


def test_missing_variable_in_an_override_is_named() -> None:
    override = "storage=${oc.env:ABSENT}"
    assert refusal("name: a", override) == f"--set {override}: storage: environment variable ABSENT is not set"


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:TOKEN}/",
        "name: a\ntrain: ${oc.env:TOKEN}",
        "name: a\ntrain: {steps: '${oc.env:TOKEN}'}",
        "name: a\ntrain: [1, '${oc.env:TOKEN}']",
        "name: a\nteacher: {kind: '${oc.env:TOKEN}'}",
        "name: a\nbogus: ${oc.env:TOKEN}",
    ],
)
def test_values_from_the_environment_are_never_shown(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "Hunter-2-Secret")
    assert "Hunter" not in refusal(text)


# Writing.

FULL = Job(
    name="full",
    data=Data(source=TextSource(kind="text", paths=("a/**", "*.txt")), tokenizer=TeacherTokenizer(kind="teacher")),
    teacher=TransformersTeacher(kind="transformers", path="org/model", replicas=Replicas(max=4)),
    labels=TopkLabels(kind="topk", temperatures=(1.0, 2.5), run_ahead=3),
    student=ConfigStudent(model=Model(config={"n": [1, {"x": None, "y": 1e-300}], "k" * 200: "no", "1": True})),
    objective=Objective(temperature=2.5),
    train=Train(learning_rate=1e-5),
)


@pytest.mark.parametrize("job", [Job(name="a"), FULL, Job(name="b", teacher=PretrainTeacher(train=Train(steps=20)))])
def test_resolved_job_reads_back_equal(job: Job) -> None:
    text = resolved_yaml(job)
    assert load(text) == job
    assert resolved_yaml(load(text)) == text


AWKWARD = st.text("${}\\ocenv:. #'\"\n\t-?!&*%@`,[]1e5é\x85\u2028\ufeff", min_size=1)


@settings(in_shared_folder, max_examples=60)
@given(AWKWARD | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), st.floats(1e-300, 1))
def test_any_text_and_number_reads_back_equal(text: str, number: float) -> None:
    config = Model(config={text: [text, number]})
    job = Job(name="a", storage=text, tracking=Tracking(uri=text), student=ConfigStudent(model=config))
    assert load(resolved_yaml(job)) == job


def test_schema_lists_every_section() -> None:
    assert set(job_schema()["properties"]) == set(Job.model_fields)


def test_the_schema_that_job_files_point_editors_to_is_current() -> None:
    file = ROOT / "orchestrator" / "spec" / "job.schema.json"
    assert json.loads(file.read_text()) == job_schema(), "run: distill schema > orchestrator/spec/job.schema.json"
    for job in (ROOT / "jobs").glob("*.yaml"):
        assert job.read_text().startswith("# yaml-language-server: $schema=../orchestrator/spec/job.schema.json\n")
