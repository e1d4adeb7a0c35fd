"""`distill init`: what it writes for a corpus, a teacher and a machine loads, is planned, and fills its windows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.pack import pack_piece
from orchestrator.data.prepare import Corpus, token_manifest
from orchestrator.data.sizing import shard_rows
from orchestrator.data.sources import corpus_bytes, list_pieces
from orchestrator.data.tokenizer import tokenizer_facts, train_tokenizer
from orchestrator.errors import DataError, DistillError, SpecError
from orchestrator.init.sizes import Machine
from orchestrator.init.teacher import PRUNABLE, TeacherFolder, pruned_student, small_student, teacher_found
from orchestrator.init.text import Found, rows_found, standard_library, text_found
from orchestrator.init.write import Wanted, write_job
from orchestrator.models.build import build_model, model_config
from orchestrator.models.prune import check_prunable
from orchestrator.models.tokenizer import copy_tokenizer
from orchestrator.plan.make import make_plan
from orchestrator.spec.data import TrainTokenizer
from orchestrator.spec.job import Job
from orchestrator.spec.load import load_job
from orchestrator.spec.model import Model, PrunedStudent
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from tests.field.cases import save_model, write_jsonl

ROOT = Path(__file__).parents[2]
LAPTOP = Machine(cores=2, gpus=0)
MACHINES = (Machine(1, 0), LAPTOP, Machine(16, 0), Machine(32, 1), Machine(64, 8))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherFolder:
    return teacher_found(str(save_model(tmp_path_factory.mktemp("init") / "teacher")))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """34 short markdown files, the user's folder that the defaults had no held-out window for."""
    folder = tmp_path / "my [notes] ${x}"
    folder.mkdir()
    for name in sorted(topics.topics)[:34]:
        (folder / f"{name}.md").write_text(f"# {name}\n{topics.topics[name][:4000]}")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    pairs = itertools.chain.from_iterable(
        [{"question": f"What of {name}?", "answer": part, "id": name} for part in text.split("\n\n")]
        for name, text in sorted(topics.topics.items())[:30]
    )
    return write_jsonl(tmp_path / "qa.jsonl", list(pairs))


def written(file: Path, found: Found, teacher: TeacherFolder | None, cluster: bool = False, on: Machine = LAPTOP) -> Job:
    write_job(file, Wanted(found, teacher, cluster, on))
    return load_job(file)


def tokenized(job: Job, folder: Path, teacher: TeacherFolder | None) -> TokenManifest:
    """What the data stage makes of the job's corpus, in this process."""
    store, tokenizer = LocalStore(folder), job.data.tokenizer
    size = corpus_bytes(job.data.source)
    data = job.data.model_copy(update={"rows_per_shard": shard_rows(job.data, size)})
    pieces = list_pieces(data)
    with store.folder_for("data/key/tokenizer") as made:
        if isinstance(tokenizer, TrainTokenizer):
            train_tokenizer(job.data, tokenizer, pieces, made)
        else:
            assert teacher is not None
            copy_tokenizer(Path(teacher.path), made)
    facts = tokenizer_facts(store.path("data/key/tokenizer"))
    packed = [pack_piece(store, "data/key", data, piece, facts) for piece in pieces]
    return token_manifest(store, Corpus("key", data, None), facts, packed)


def test_without_options_it_is_the_quickstart(tmp_path: Path) -> None:
    job, quickstart = written(tmp_path / "job.yaml", standard_library(), None), load_job(ROOT / "jobs" / "quickstart.yaml")
    assert job.model_dump() == quickstart.model_dump()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["notes", "rows"])
def test_the_corpus_fills_its_windows(
    kind: str, own: bool, tmp_path: Path, teacher: TeacherFolder, request: pytest.FixtureRequest
) -> None:
    """Fault of kind: a small corpus whose held-out documents fill no window, found after half a minute of running."""
    path = str(request.getfixturevalue(kind))
    found = text_found(path) if kind == "notes" else rows_found(path, None, None)
    job = written(tmp_path / "job.yaml", found, teacher if own else None)
    manifest = tokenized(job, tmp_path / "store", teacher if own else None)
    heldout, train = sum(manifest.heldout_rows), manifest.rows
    assert heldout >= job.evaluate.rows
    assert len(manifest.train) >= 4, "the student can follow shards"
    passes = job.train.steps * job.train.global_batch / train
    assert 1 <= passes <= 8


def test_windows_are_counted_as_the_data_stage_counts_them(tmp_path: Path, notes: Path) -> None:
    from orchestrator.init.sizes import cut, trained_tokenizer
    from orchestrator.init.text import lengths, read_sample

    found = text_found(str(notes))
    sample = read_sample(found.source)
    windows = cut(lengths(trained_tokenizer(sample), sample.documents), longest=256)
    manifest = tokenized(written(tmp_path / "job.yaml", found, None), tmp_path / "store", None)
    counted = [manifest.rows, sum(manifest.heldout_rows)]
    assert [windows.train, windows.heldout] == pytest.approx(counted, abs=1)


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("kind", "machine"), [("notes", LAPTOP), ("rows", LAPTOP), *(("stdlib", machine) for machine in MACHINES)]
)
def test_every_combination_loads_and_is_planned(
    kind: str,
    own: bool,
    cluster: bool,
    machine: Machine,
    tmp_path: Path,
    teacher: TeacherFolder,
    request: pytest.FixtureRequest,
) -> None:
    found: Callable[[], Found] = {
        "stdlib": standard_library,
        "notes": lambda: text_found(str(request.getfixturevalue("notes"))),
        "rows": lambda: rows_found(str(request.getfixturevalue("rows")), None, None),
    }[kind]
    file = tmp_path / "job.yaml"
    job = written(file, found(), teacher if own else None, cluster, machine)
    plan = make_plan(job)
    assert max(len(line) for line in file.read_text().splitlines() if str(tmp_path) not in line) <= 128
    if not cluster:
        assert plan.cpu_slots <= machine.cores + 1, "what goes on side by side fits the cores"
        assert max(stage.gpus for stage in plan.stages) <= machine.gpus
    assert (job.cluster.address == "auto") == cluster


def test_columns_are_guessed_and_can_be_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "lang": "c", "score": 1}])
    guessed = rows_found(str(file), None, None)
    assert (guessed.source.prompt, getattr(guessed.source, "field", None)) == ("instruction", "output")
    assert guessed.notes == ("guessed from the column names: --prompt instruction, --response output", "not read: lang")
    named = rows_found(str(file), "output", "lang")
    assert (named.source.prompt, getattr(named.source, "field", None)) == ("output", "lang")
    assert rows_found(str(write_jsonl(tmp_path / "b.jsonl", ["only text"])), None, None).source.prompt is None
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "c.parquet")
    assert getattr(rows_found(str(tmp_path / "c.parquet"), None, None).source, "column", None) == "completion"


CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("row", "prompt", "named"),
    [
        (CHAT, None, "'messages' in .* holds chats"),
        ({"a": "b"}, None, "name one by --response"),
        ({"answer": "b"}, "question", "no text column 'question'"),
        ({"answer": "b", "question": 3}, "question", "no text column 'question'"),
    ],
)
def test_rows_that_cannot_be_learnt(row: dict[str, object], prompt: str | None, named: str, tmp_path: Path) -> None:
    """Fault of kind: nested columns, refused after three quarters of a minute in pyarrow's words."""
    with pytest.raises(DistillError, match=named):
        rows_found(str(write_jsonl(tmp_path / "a.jsonl", [row])), prompt, None)


def test_what_cannot_become_a_job(tmp_path: Path, notes: Path) -> None:
    (tmp_path / "one.txt").write_text("A single document. " * 2000)
    with pytest.raises(DataError, match=r"1 documents of .* at least 10 documents"):
        written(tmp_path / "job.yaml", text_found(str(tmp_path / "one.txt")), None)
    with pytest.raises(SpecError, match="no file there"):
        text_found(str(tmp_path / "none"))
    with pytest.raises(SpecError, match=r"has no config\.json"):
        teacher_found(str(notes))
    (tmp_path / "job.yaml").write_text("mine")
    with pytest.raises(SpecError, match="--force"):
        written(tmp_path / "job.yaml", text_found(str(notes)), None)
    assert (tmp_path / "job.yaml").read_text() == "mine"


def test_documents_that_are_not_utf8_are_named(tmp_path: Path, notes: Path) -> None:
    (notes / "old.md").write_bytes("Grüße".encode("latin-1"))
    job = written(tmp_path / "job.yaml", text_found(str(notes)), None)
    assert job.data.undecodable == "skip"
    assert "1 of the documents" in (tmp_path / "job.yaml").read_text()


@pytest.mark.parametrize("kind", PRUNABLE)
def test_students_proposed_for_every_family(kind: str) -> None:
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = build_model(Model(type=kind, config=small | {"num_key_value_heads": 2, "head_dim": 32}), 512, 0, "student")
    found = TeacherFolder("here", kind, model.config.to_dict(), Path("tokenizer.json"))
    pruned = pruned_student(found)
    assert pruned == {"layers": 2, "intermediate_size": 128}
    check_prunable(model, PrunedStudent(kind="pruned", **pruned), "student")
    proposed = small_student(found)
    assert proposed["type"] == kind
    assert build_model(Model(**proposed), 512, 0, "student").num_parameters() < model.num_parameters() / 2


@given(st.integers(8, 12288), st.integers(1, 128))
def test_a_student_of_any_teacher_can_be_built(width: int, blocks: int) -> None:
    proposed = small_student(TeacherFolder("here", "gpt2", {"n_embd": width, "n_layer": blocks}, Path("tokenizer.json")))
    config = model_config(Model(**proposed), 512, "student")
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.hidden_size // config.num_attention_heads % 2 == 0, "rotary embeddings turn pairs"


def test_the_command_prints_what_comes_next(tmp_path: Path, rows: Path) -> None:
    from typer.testing import CliRunner

    from orchestrator.cli import app

    file = tmp_path / "job.yaml"
    done = CliRunner().invoke(app, ["init", str(file), "--rows", str(rows)])
    assert done.exit_code == 0, done.output
    assert f"  distill plan {file}\n  distill run {file}\n" in done.output
    assert json.dumps(str(rows)) in file.read_text()
