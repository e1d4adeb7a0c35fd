"""A run that is evaluated while it trains, stops early and keeps its best model: undisturbed, and killed and continued."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from orchestrator.store.heldout import watched_rows
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MANIFEST, TokenManifest
from orchestrator.tracking import names
from tests.tiny import (
    DISTILL,
    Ended,
    Json,
    contents,
    distill,
    metric_points,
    only,
    report,
    sha256,
    started,
    steps_seen,
    student_weights,
    tiny_job,
    write_corpus,
    write_job,
)

pytestmark = pytest.mark.timeout(1800)

EVERY, PATIENCE, ROWS, STEPS = 10, 3, 5, 200
CHECKPOINT_EVERY = 15
"""No multiple of `EVERY`: a best model is kept between two checkpoints."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """A learning rate at which the held-out cross entropy soon rises, and labels that run ahead by one shard only."""
    folder = tmp_path_factory.mktemp("evaluation")
    job = tiny_job(write_corpus(folder / "corpus"), folder / "store")
    job["evaluate"] |= {"every": EVERY, "every_rows": ROWS}
    job["labels"] |= {"run_ahead": 1}
    job["train"] |= {"keep": "best", "patience": PATIENCE, "learning_rate": 0.05, "schedule": "constant"}
    job["train"] |= {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY}
    return job


@pytest.fixture(scope="module")
def undisturbed(job: Json) -> Ended:
    return distill(Path(job["storage"]).parent / "log", "run", write_job(job)).assert_ok()


def curve(storage: Path, stage: str = "student", name: str = names.HELDOUT_CE_NATS) -> dict[int, float]:
    """By steps done."""
    return {p["step"] + 1: p["metrics"][name] for p in metric_points(storage, stage) if name in p["metrics"]}


def training(storage: Path) -> Json:
    return json.loads((only(storage / "student") / MANIFEST).read_text())["training"]


def test_it_stops_and_keeps_the_best(job: Json, undisturbed: Ended) -> None:
    storage = Path(job["storage"])
    ce, kl, figures = curve(storage), curve(storage, name=names.HELDOUT_KL_NATS), training(storage)
    best = min(ce, key=lambda step: ce[step])
    assert list(ce) == list(kl) == list(range(EVERY, best + PATIENCE * EVERY + 1, EVERY))
    assert best + PATIENCE * EVERY < STEPS, "or nothing was stopped"
    assert figures["kept_step"] == best and figures["steps"] == max(ce) and figures["steps_asked"] == STEPS
    assert figures["rows_seen"] == max(ce) * job["train"]["global_batch"]
    assert figures["tokens_seen"] == figures["rows_seen"] * job["data"]["seq_len"]
    assert figures["passes"] == figures["rows_seen"] / figures["rows_there"]
    assert f"student: stopped at step {max(ce)} of {STEPS}" in undisturbed.stderr
    line = re.search(r"^student +ran .*", undisturbed.stderr, re.MULTILINE)
    assert line and f" {max(ce)} steps " in line[0], "the last line has the last step"
    assert sorted(p.name for p in only(storage / "student").iterdir()) == ["lock", MANIFEST, "model"], "nothing is left behind"
    assert curve(storage, "teacher").keys() == {10}, "and the teacher, which is trained here, has a curve too"


def test_the_kept_model_is_the_one_that_was_measured(job: Json, undisturbed: Ended) -> None:
    from transformers import AutoModelForCausalLM

    storage = Path(job["storage"])
    store, folder = LocalStore(storage), f"data/{only(storage / 'data').name}"
    manifest = TokenManifest.load(store, f"{folder}/{MANIFEST}")
    assert manifest is not None
    ids = torch.from_numpy(watched_rows(store, folder, manifest, ROWS).ids).long()
    model = AutoModelForCausalLM.from_pretrained(only(storage / "student") / "model", dtype=torch.float32).double()
    with torch.no_grad():
        log_q = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    ce = float(-log_q.gather(2, ids[:, 1:, None]).mean())
    posted = curve(storage)
    assert ce == pytest.approx(min(posted.values()), rel=1e-5)
    assert ce != pytest.approx(posted[max(posted)], rel=1e-3), "the last model is another"


def test_labels_of_steps_that_were_not_made_are_there(job: Json, undisturbed: Ended) -> None:
    """The demand stays whole, and a teacher that may run ahead by one shard does not wait for a student that has ended."""
    storage = Path(job["storage"])
    tokens = json.loads((only(storage / "data") / MANIFEST).read_text())
    ledger = report(storage)["ledger"]
    demanded = min(STEPS * job["train"]["global_batch"], sum(shard["rows"] for shard in tokens["train"]))
    assert ledger["planned"] == ledger["committed"] >= demanded > training(storage)["rows_seen"]
    shards = sorted(len(list(log.glob("commits/*.json"))) for log in (storage / "labels").iterdir())
    assert shards[0] == 1 and len(shards) == 2, "and the held-out rows have a log of their own"


def test_killed_and_continued_it_keeps_the_very_same(job: Json, undisturbed: Ended, tmp_path: Path) -> None:
    storage = Path(job["storage"])
    last = int(training(storage)["steps"])
    again = job | {"storage": str(tmp_path / "store")}
    file = write_job(again, tmp_path)
    with started(tmp_path / "log", *DISTILL, "run", file) as run:
        # Past the last checkpoint, so that the best model of the killed attempt may be newer than it.
        run.until(lambda: steps_seen(tmp_path / "store") > last - 5)
        assert run.running
        run.kill()
    before = curve(tmp_path / "store")
    assert before and contents(tmp_path / "store" / "student"), "something had been evaluated and kept"
    distill(tmp_path / "log-again", "run", file).assert_ok()
    assert student_weights(tmp_path / "store") == student_weights(storage)
    assert curve(tmp_path / "store") == curve(storage)
    same = ("kept_step", "steps", "rows_seen", "final_loss_nats")
    assert {name: training(tmp_path / "store")[name] for name in same} == {name: training(storage)[name] for name in same}
    assert sha256(only(tmp_path / "store" / "student") / "model" / "config.json") == sha256(
        only(storage / "student") / "model" / "config.json"
    )
