"""All that is measured of three models, one after the other, beside whole distributions of all of them in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from orchestrator.errors import DataError
from orchestrator.evaluate import measure as measuring
from orchestrator.evaluate.bootstrap import intervals
from orchestrator.evaluate.figures import ECE_BINS, gap_recovered
from orchestrator.evaluate.measure import Measured, measure
from orchestrator.evaluate.model import AnsweringTeacher, Result, Subject
from orchestrator.evaluate.windows import Heldout
from orchestrator.spec.labels import HiddenLabels, TopkLabels
from orchestrator.teacher.backend import Replica, TransformersBackend
from tests.answers import EXACT, Here, answer, answer_log, heldout_of, saved
from tests.conftest import TokenizedCorpus
from tests.unit.test_tokens import VOCAB, tiny

Models = dict[str, PreTrainedModel]
MODELS = ("teacher", "student", "baseline")


@pytest.fixture
def models(seed: int) -> Models:
    return {name: tiny(seed + i, 32 if name == "teacher" else 16) for i, name in enumerate(MODELS)}


def measured(
    models: Models, heldout: Heldout, folder: Path, dtype: Any = "fp32", told: bool = True, here: Here | None = None
) -> tuple[Measured, list[str]]:
    """What is measured of `models`, and the warnings; the teacher has answered in `dtype` if it has `told` at all."""
    folders = {name: saved(model, folder / name) for name, model in models.items()}
    if told:
        replica = Replica(str(folders["teacher"]), dtype)
        answer(heldout, TransformersBackend(replica), VOCAB, replica)
    subjects = {name: Subject(str(place), "fp32") for name, place in folders.items() if name != "teacher"}
    warnings: list[str] = []
    teacher = AnsweringTeacher(str(folders["teacher"]), dtype, VOCAB)
    bench: Any = here or Here(5)
    return measure(heldout, teacher, subjects, bench, warnings.append), warnings


@torch.no_grad()
def whole(model: PreTrainedModel, heldout: Heldout) -> torch.Tensor:
    """[targets, vocab]: log-probabilities in float64 at the targets that count, from the model's own logits."""
    rows = heldout.rows()
    logits = model(input_ids=torch.from_numpy(rows.ids[:, :-1]).long()).logits
    return logits[torch.from_numpy(rows.counted())].double().log_softmax(-1)


def expected(models: Models, heldout: Heldout) -> dict[str, dict[str, float]]:
    """The figures by the definitions of the field."""
    rows = heldout.rows()
    targets = torch.from_numpy(rows.ids[:, 1:][rows.counted()]).long()
    said = {name: whole(model, heldout) for name, model in models.items()}
    found: dict[str, dict[str, float]] = {}
    for name, log_probs in said.items():
        top, choice = log_probs.max(-1)
        right, confidence = (choice == targets).double(), top.exp()
        ece = 0.0
        for i in range(ECE_BINS):
            inside = (confidence * ECE_BINS).long().clamp_max(ECE_BINS - 1) == i
            if inside.any():
                ece += float(inside.double().mean() * (right[inside].mean() - confidence[inside].mean()).abs())
        figures = {
            "heldout_ce_nats": -float(log_probs.gather(1, targets[:, None]).mean()),
            "top1_accuracy": float(right.mean()),
            "ece": ece,
        }
        figures["heldout_ppl"] = math.exp(figures["heldout_ce_nats"])
        if name != "teacher":
            p = said["teacher"]
            figures["kl_to_teacher_nats"] = float((p.exp() * (p - log_probs)).sum(-1).mean())
            figures["top1_agreement"] = float((p.argmax(-1) == choice).double().mean())
        found[name] = figures
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_figures_are_those_of_whole_distributions(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path, masked: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    ids, kept = torch.randint(VOCAB, (11, 33), generator=random), torch.rand(11, 32, generator=random) < 0.5
    kept[:, 0] = True
    tokenizer = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    heldout = heldout_of(store, ids, kept if masked else None, tokenizer)
    found, warnings = measured(models, heldout, tmp_path)
    assert not warnings
    due = expected(models, heldout)
    for name, figures in due.items():
        for figure, value in figures.items():
            assert found.figures[name][figure] == pytest.approx(value, rel=2e-5, abs=1e-6), (name, figure)
        assert found.figures[name]["params"] == sum(p.numel() for p in models[name].parameters())
        assert found.figures[name]["tokens_per_s"] > 0 and found.figures[name]["size_bytes"] > 0
    assert due["student"] != pytest.approx(due["baseline"], rel=2e-5, abs=1e-6), "models can be told apart"
    theirs = whole(models["teacher"], heldout)
    entropy = -float((theirs.exp() * theirs).sum(-1).mean())
    bins = found.by_token["by_teacher_entropy"]
    mean = np.average(bins["entropy_nats"], weights=bins["tokens"])
    assert mean == pytest.approx(entropy, rel=1e-5) and found.by_token["tokens"] == len(theirs)
    assert found.by_token["teacher_ids"] is None, "they are exact"


def test_many_shards_are_as_one(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(VOCAB, (11, 33), generator=torch.Generator().manual_seed(seed))
    tokenizer = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    one, _ = measured(models, heldout_of(store, ids, None, tokenizer), tmp_path / "one")
    monkeypatch.setattr("orchestrator.store.heldout.ANSWER_TOKENS", 3 * 32)
    heldout = replace(heldout_of(store, ids, None, tokenizer), log=answer_log(store, 11, HiddenLabels(kind="hidden")))
    heldout = replace(heldout, log=replace(answer_log(store, 10_011), rows=11))
    assert [len(part) for part in heldout.log.shards(heldout.manifest)] == [3, 3, 3, 2]
    four, _ = measured(models, heldout, tmp_path / "four")
    assert len(heldout.log.open(store).shards()) == 4
    for name, figures in one.figures.items():
        same = {figure: value for figure, value in figures.items() if figure != "tokens_per_s"}
        assert {figure: four.figures[name][figure] for figure in same} == pytest.approx(same, rel=1e-6)
    assert [[t.text for t in sample] for sample in four.samples] == [[t.text for t in sample] for sample in one.samples]
    assert four.generated == one.generated


def test_a_bf16_teacher_is_compared_as_it_answered(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    """Stored in fp32, its states are what they were: figures are those of the model itself in bf16."""
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    heldout = heldout_of(store, ids, None, tokenized.store.path(f"{tokenized.folder}/tokenizer"))
    found, _ = measured(models, heldout, tmp_path, "bf16")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    due = expected(models | {"teacher": rounded}, heldout)
    for name in MODELS:
        for figure in ("heldout_ce_nats", *(("kl_to_teacher_nats",) if name != "teacher" else ())):
            assert found.figures[name][figure] == pytest.approx(due[name][figure], rel=1e-4), (name, figure)
    plain = expected(models, heldout)["teacher"]["heldout_ce_nats"]
    assert found.figures["teacher"]["heldout_ce_nats"] != pytest.approx(plain, rel=1e-5), "bf16 does show"


def test_intervals_and_continuations_are_of_the_same_windows(
    models: Models, tokenized: TokenizedCorpus, store: Any, tmp_path: Path
) -> None:
    """On a corpus: several windows of a document, several documents."""
    import shutil

    shutil.copytree(tokenized.store.root, store.root, dirs_exist_ok=True)
    heldout = Heldout(store, tokenized.folder, tokenized.manifest, answer_log(store, 12))
    found, _ = measured(models, heldout, tmp_path)
    rows = heldout.rows()
    documents = rows.documents or []
    assert 2 < len(set(documents)) < len(documents) == 12, "some documents have several windows"
    targets = torch.from_numpy(rows.ids[:, 1:]).long().reshape(-1, 1)
    counts = np.full(12, rows.ids.shape[1] - 1)
    nats = {name: -whole(model, heldout).gather(1, targets).view(12, -1).sum(1).numpy() for name, model in models.items()}
    due = intervals(nats, counts, documents)
    assert found.intervals and due
    for name in models:
        assert found.intervals.heldout_ce_nats[name] == pytest.approx(due.heldout_ce_nats[name], rel=1e-5)
    gap = gap_recovered(found.figures)
    if found.intervals.gap_recovered:
        assert gap is not None and found.intervals.gap_recovered[0] <= gap <= found.intervals.gap_recovered[1]
    assert [entry.keys() for entry in found.generated] == [{"prompt", *models}] * 4


def test_top_ids_alone_give_lower_bounds(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    """What a server tells: KL and entropy over its k ids and all others as one event, and the targets exactly."""
    from orchestrator.teacher import answers as writing

    k = 20
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    tokenizer = tokenized.store.path(f"{tokenized.folder}/tokenizer")
    heldout = heldout_of(store, ids, None, tokenizer, TopkLabels(kind="topk", k=k))

    class Server(TransformersBackend):
        def target_log_probs(self, ids: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return self.model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "VllmBackend", Server)
        answer(heldout, Server(Replica(str(saved(models["teacher"], tmp_path / "served")), "fp32")), VOCAB)
    found, warnings = measured(models, heldout, tmp_path, told=False)
    assert not warnings and found.by_token["teacher_ids"] == k
    p, q = whole(models["teacher"], heldout).exp(), whole(models["student"], heldout).exp()
    top = p.topk(k, -1).indices
    ps, qs = p.gather(-1, top), q.gather(-1, top)
    rest = 1 - ps.sum(-1)
    kl = (ps * (ps / qs).log()).sum(-1) + rest * (rest / (1 - qs.sum(-1))).log()
    due = expected(models, heldout)
    figures = found.figures["student"]
    assert figures["kl_to_teacher_nats"] == pytest.approx(float(kl.mean()), rel=2e-3), "fp16 log-probabilities"
    assert figures["kl_to_teacher_nats"] < 0.99 * due["student"]["kl_to_teacher_nats"], (
        "a bound that can be told from the whole"
    )
    assert found.figures["teacher"]["heldout_ce_nats"] == pytest.approx(due["teacher"]["heldout_ce_nats"], rel=1e-5)
    assert found.figures["teacher"]["top1_accuracy"] == pytest.approx(due["teacher"]["top1_accuracy"], abs=0.01)
    assert all("teacher" not in entry for entry in found.generated), "a server does not continue prompts"


def test_without_answers_the_student_is_measured_all_the_same(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    heldout = heldout_of(store, ids, None, tokenized.store.path(f"{tokenized.folder}/tokenizer"))
    found, warnings = measured(models, heldout, tmp_path, told=False)
    (warning,) = warnings
    assert warning.startswith("evaluate: the teacher could not be measured") and "answers on held-out rows" in warning
    due = expected(models, heldout)
    assert found.figures.keys() == {"student", "baseline"} and not found.by_token and not found.samples
    assert "kl_to_teacher_nats" not in found.figures["student"]
    for name in found.figures:
        assert found.figures[name]["heldout_ce_nats"] == pytest.approx(due[name]["heldout_ce_nats"], rel=1e-5)
    assert found.intervals and found.intervals.gap_recovered is None and gap_recovered(found.figures) is None
    assert all(entry.keys() == {"prompt", "student", "baseline"} for entry in found.generated)


class Failing(Here):
    """A process in which measuring `model` fails."""

    def __init__(self, model: str) -> None:
        super().__init__(5)
        self.failed, self._model = 0, model

    def model(self, name: str, subject: Subject, heldout: Heldout, teacher: AnsweringTeacher | None) -> Result:
        if name == self._model:
            self.failed += 1
            raise RuntimeError("out of memory")
        return super().model(name, subject, heldout, teacher)


def test_a_baseline_that_cannot_be_measured_costs_its_figures_alone(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    heldout = heldout_of(store, ids, None, tokenized.store.path(f"{tokenized.folder}/tokenizer"))
    failing = Failing("baseline")
    found, warnings = measured(models, heldout, tmp_path, here=failing)
    assert failing.failed == 1
    assert warnings == ["evaluate: the baseline could not be measured: RuntimeError: out of memory"]
    assert found.figures.keys() == {"teacher", "student"} and gap_recovered(found.figures) is None
    assert found.figures["student"]["kl_to_teacher_nats"] > 0 and len(found.samples) == 3
    with pytest.raises(RuntimeError, match="out of memory"):
        measured(models, heldout, tmp_path, here=Failing("student"))


def test_prompts_that_cannot_be_continued_cost_the_texts_alone(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    heldout = heldout_of(store, ids, None, tokenized.store.path(f"{tokenized.folder}/tokenizer"))

    def fail(*_: Any) -> None:
        raise RuntimeError("no cache for this one")

    monkeypatch.setattr("orchestrator.evaluate.model.continuations", fail)
    found, warnings = measured(models, heldout, tmp_path)
    assert [w for w in warnings if "no cache for this one" in w] == warnings and len(warnings) == 2
    assert all(entry["student"] is None and entry["teacher"] for entry in found.generated) and len(found.generated) == 4
    assert found.figures["student"]["kl_to_teacher_nats"] > 0
    monkeypatch.setattr(measuring, "texts_of", fail)
    found, warnings = measured(models, heldout, tmp_path)
    assert found.generated == [] and warnings[-1].startswith("evaluate: the report shows no prompts")


def test_a_student_without_a_finite_loss_is_an_error(
    seed: int, models: Models, store: Any, tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    ids = torch.randint(VOCAB, (6, 33), generator=torch.Generator().manual_seed(seed))
    heldout = heldout_of(store, ids, None, tokenized.store.path(f"{tokenized.folder}/tokenizer"))
    with torch.no_grad():
        next(models["student"].parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="student: the held-out cross entropy is not finite"):
        measured(models, heldout, tmp_path)


def test_what_is_kept_is_the_smallest_that_is_exact() -> None:
    """Bytes a token of labels that give exact divergences: the states of any teacher that is narrower than its vocabulary."""
    from orchestrator.plan.memory import label_bytes_per_token
    from orchestrator.spec.labels import DenseLabels

    dense = DenseLabels(kind="dense", dtype="fp32")
    for vocab, width in ((4096, 256), (262_144, 640), (129_280, 7168)):
        assert label_bytes_per_token(EXACT, vocab, width) == 4 * width < label_bytes_per_token(dense, vocab, width)
