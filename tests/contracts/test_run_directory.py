"""Runs do not overwrite each other: a changed job under the same name gets a directory of its own, the same job its old one."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.directory import RUN, claim_directory, claimed, identity_of
from orchestrator.run.listing import list_runs
from orchestrator.spec.job import Job
from orchestrator.store.files import Store, open_store


@pytest.fixture(params=["directory", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store") if request.param == "directory" else request.getfixturevalue("s3")


def job(name: str = "a", **fields: Any) -> Job:
    return Job.model_validate_json(json.dumps({"name": name} | fields))


def test_a_changed_job_is_another_run_and_the_same_job_the_same(store: Store) -> None:
    first, second, third = job(), job(seed=1), job(objective={"alpha": 0.5})
    assert [claim_directory(store, j).key for j in (first, second, third)] == ["runs/a", "runs/a-2", "runs/a-3"]
    assert [claim_directory(store, j).key for j in (third, first, second)] == ["runs/a-3", "runs/a", "runs/a-2"]
    elsewhere = job(
        seed=1, tracking={"enabled": False}, train={"workers": 2, "micro_batch": 2}, labels={"kind": "sampled", "run_ahead": 3}
    )
    assert claim_directory(store, elsewhere).run == "a-2", "it changes no result"
    assert [(d.run, d.number, d.identity) for d in claimed(store)] == [
        ("a", 1, identity_of(first)),
        ("a-2", 2, identity_of(second)),
        ("a-3", 3, identity_of(third)),
    ]


def test_a_name_that_looks_numbered_shares_no_directory(store: Store) -> None:
    assert claim_directory(store, job("a")).run == "a"
    assert claim_directory(store, job("a-2", seed=1)).run == "a-2"
    assert claim_directory(store, job("a", seed=1)).run == "a-3"
    assert claim_directory(store, job("a-2")).run == "a-2-2"


def test_many_starters_at_once(store: Store) -> None:
    jobs = [job(seed=i % 6) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        runs = list(pool.map(lambda j: claim_directory(store, j).run, jobs))
    by_seed = [set(runs[seed::6]) for seed in range(6)]
    assert all(len(found) == 1 for found in by_seed) and len(set.union(*by_seed)) == 6, "one job, one directory"
    assert [d.run for d in claimed(store)] == ["a", *(f"a-{n}" for n in range(2, 7))]


def test_a_removed_directory_frees_no_number(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for seed in range(11):
        store.replace(f"{claim_directory(store, job(seed=seed)).key}/{RUN}", b"{}")
    store.remove("runs/a-2")
    assert claim_directory(store, job(seed=99)).run == "a-12"
    assert claim_directory(store, job(seed=1)).run == "a-2"
    assert [d.number for d in claimed(store)] == list(range(1, 13))


def test_a_run_of_an_earlier_version_is_left_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.replace(f"runs/a/{RUN}", json.dumps({"name": "a", "status": "finished", "attempt": 1}).encode())
    assert claim_directory(store, job()).run == "a-2"
    assert claim_directory(store, job()).run == "a-2"


def texts(folder: Path) -> Job:
    return job(data={"source": {"kind": "text", "paths": [f"{folder}/*.txt"]}})


def test_the_same_job_on_other_documents_is_another_run(store: Store, tmp_path: Path) -> None:
    """Else the old report would be overwritten, or taken for that of the new documents."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.md").write_text("not read")
    made = texts(tmp_path)
    assert claim_directory(store, made).run == "a"
    (tmp_path / "a.md").write_text("not read, and changed")
    assert claim_directory(store, made).run == "a", "the same files continue"
    (tmp_path / "b.txt").write_text("two")
    assert claim_directory(store, made).run == "a-2"
    os.utime(tmp_path / "b.txt", ns=(5, 5))
    assert claim_directory(store, made).run == "a-3"
    (tmp_path / "b.txt").unlink()
    assert claim_directory(store, made).run == "a", "the first was left as it is"
    assert [bool(r.differs) for r in list_runs(store)] == [False] * 3, "none has begun"
    for found in claimed(store):
        store.replace(f"{found.key}/plan.json", json.dumps({"job": made.model_dump(mode="json")}).encode())
    assert [[*r.differs] for r in list_runs(store)] == [[], ["inputs"], ["inputs"]]


def test_other_bytes_in_a_local_model_make_another_run(tmp_path: Path) -> None:
    teacher, student, gguf = tmp_path / "teacher", tmp_path / "student", tmp_path / "[q4].gguf"
    tokenizer = {"tokenizer": {"kind": "teacher"}}
    for folder in (teacher, student):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"1")
        (folder / "optimizer.pt").write_bytes(b"1")
    gguf.write_bytes(b"1")
    of_folders = job(
        data=tokenizer,
        teacher={"kind": "transformers", "path": str(teacher)},
        student={"kind": "checkpoint", "path": str(student)},
    )
    of_file = job(data=tokenizer, teacher={"kind": "gguf", "file": str(gguf)})
    seen = [identity_of(of_folders), identity_of(of_file)]
    (teacher / "optimizer.pt").write_bytes(b"22")
    assert [identity_of(of_folders), identity_of(of_file)] == seen, "nobody reads it"
    for file in (teacher / "model.safetensors", teacher / "tokenizer.json", student / "model.safetensors", gguf):
        file.write_bytes(b"22")
        now = identity_of(of_file if file == gguf else of_folders)
        assert now not in seen, file
        seen.append(now)


@pytest.mark.parametrize(
    "fields",
    [
        {"data": {"source": {"kind": "jsonl", "paths": ["/nowhere/*.jsonl"]}}},
        {"data": {"source": {"kind": "dataset", "name": "owner/name"}}},
        {"data": {"tokenizer": {"kind": "teacher"}}, "teacher": {"kind": "transformers", "path": "owner/name"}},
        {"data": {"tokenizer": {"kind": "teacher"}}, "teacher": {"kind": "gguf", "file": "/nowhere/x.gguf"}},
    ],
    ids=["no corpus", "a dataset of the hub", "a teacher of the hub", "no GGUF file"],
)
def test_files_that_are_not_here_are_for_the_checks_to_complain_of(fields: dict[str, Any]) -> None:
    assert identity_of(job(**fields)) == identity_of(job(**fields))


def test_a_start_reads_the_claims_of_its_own_name_alone(store: Store) -> None:
    for name in ("a", "ab", "a-x", "a.2"):
        claim_directory(store, job(name))
    store.replace("runs/.claims/ab", b"damaged, and of another job")
    assert claim_directory(store, job(seed=1)).run == "a-2"
    assert [d.run for d in claimed(store, "a")] == ["a", "a-2"]


def test_runs_are_listed_with_what_differs_and_how_they_stand(store: Store) -> None:
    """One that says it is running is believed while somebody holds its lock."""
    jobs = [job(), job(seed=1, objective={"alpha": 0.5}), job("b")]
    for made, status in zip(jobs, ("finished", "running", "running"), strict=True):
        key = claim_directory(store, made).key
        store.replace(f"{key}/plan.json", json.dumps({"job": made.model_dump(mode="json")}).encode())
        store.replace(f"{key}/{RUN}", json.dumps({"status": status, "started_s": 5.0, "seconds": 61.0}).encode())
    ces = {"teacher": 4.75, "student": 5.5, "baseline": 5.75}
    figures = {name: {"heldout_ce_nats": ce} for name, ce in ces.items()} | {"gap_recovered": 0.25}
    store.replace("runs/a/report.json", json.dumps(figures).encode())
    claim_directory(store, job("c"))  # and nothing more
    with store.exclusive("runs/b/lock"):
        found = list(list_runs(store))
    assert [(r.run, r.status, r.differs) for r in found] == [
        ("a", "finished", {}),
        ("a-2", "killed", {"seed": 1, "objective.alpha": 0.5}),
        ("b", "running", {}),
        ("c", "killed", {}),
    ]
    assert (found[0].student_heldout_ce_nats, found[0].gap_recovered, found[0].seconds) == (5.5, 0.25, 61.0)
    assert found[1].student_heldout_ce_nats is None
    assert [r.run for r in list_runs(store, "a")] == ["a", "a-2"]
