"""All that is measured of three models at once, on held-out windows of a real corpus; without a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluate.bootstrap import intervals
from orchestrator.evaluate.measure import Heldout, Subject, _answers, _measured, gap_recovered
from tests.conftest import TokenizedCorpus
from tests.unit.test_tokens import reference, tiny


def test_figures_intervals_and_continuations_are_of_the_same_windows(
    seed: int, tokenized: TokenizedCorpus, tmp_path: Path
) -> None:
    models = {"teacher": tiny(seed, 32), "student": tiny(seed + 1, 16), "baseline": tiny(seed + 2, 16)}
    for name, model in models.items():
        shutil.copytree(tokenized.store.path(f"{tokenized.folder}/tokenizer"), tmp_path / name)
        model.save_pretrained(tmp_path / name)
    subjects = {name: Subject(str(tmp_path / name), "fp32") for name in models}
    heldout = Heldout(tokenized.store, tokenized.folder, tokenized.manifest, rows=12)
    found = _measured(heldout, subjects, 5, models, {name: _answers(model) for name, model in models.items()})

    windows, _, documents = heldout.windows()
    assert 2 < len(set(documents)) < len(documents) == len(windows), "some documents have several windows"
    targets = np.full(len(windows), windows.shape[1] - 1)
    nats = {}
    for name, model in models.items():
        said = reference(model, windows).gather(1, windows[:, 1:].reshape(-1, 1))
        nats[name] = -said.view(len(windows), -1).sum(1).numpy()
        assert found.figures[name]["heldout_ce_nats"] == pytest.approx(nats[name].sum() / targets.sum(), rel=1e-5)
    expected = intervals(nats, targets, documents)
    assert found.intervals and expected
    for name in models:
        assert found.intervals.heldout_ce_nats[name] == pytest.approx(expected.heldout_ce_nats[name], rel=1e-5)
    gap = gap_recovered(found.figures)
    if found.intervals.gap_recovered:
        assert gap is not None and found.intervals.gap_recovered[0] <= gap <= found.intervals.gap_recovered[1]
    assert [entry.keys() for entry in found.generated.texts] == [{"prompt", *models}] * 4
