"""Targets that are not learnt: they are in no loss and no gradient (and in no figure: `unit/test_measured.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.labels.targets import Dense
from orchestrator.losses.objective import Mixture
from orchestrator.losses.schedule import combined
from orchestrator.models.build import build_model
from orchestrator.models.mtp import MultiTokenPrediction
from orchestrator.spec.model import Model
from orchestrator.spec.objective import ForwardKl
from orchestrator.student.distiller import Distiller, head_loss
from orchestrator.student.feed import Mask

VOCAB, ROWS, SEQ, MTP_WEIGHT = 61, 3, 10, 0.3
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
MODEL = Model(config={**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 2})
MIXTURE = Mixture(0.3, 0.7, 1.0, combined((ForwardKl(),)))


class Case:
    """A student with one multi-token-prediction module, ids, a teacher's logits, and which targets are learnt."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        model = build_model(MODEL, VOCAB, seed, "student").double()
        self.student = Distiller(model, None, MultiTokenPrediction(model, 1, seed), MTP_WEIGHT)
        self.ids = torch.randint(VOCAB, (ROWS, SEQ + 1), generator=generator)
        self.teacher = torch.randn(ROWS, SEQ, VOCAB, generator=generator, dtype=torch.float64)
        self.kept = torch.rand(ROWS, SEQ, generator=generator) < 0.5

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [*self.student.model.parameters()]))

    def terms(self, mask: Mask | None) -> torch.Tensor:
        return self.student(self.ids, MIXTURE, Dense(self.teacher), {}, mask)

    def reference(self, weight: torch.Tensor) -> torch.Tensor:
        """The loss with one `weight` [rows, seq] a target, out of whole distributions."""
        hidden: Any = self.student.model.base_model(input_ids=self.ids[:, :-1]).last_hidden_state
        assert self.student.mtp is not None
        (ahead,) = self.student.mtp(hidden, self.ids)
        now = self._mean(hidden, self.teacher, self.ids[:, 1:], weight)
        later = self._mean(ahead, self.teacher[:, 1:], self.ids[:, 2:], weight[:, 1:] * SEQ / (SEQ - 1))
        return now + MTP_WEIGHT * later

    def _mean(self, hidden: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        log_q, p = self.student.model.lm_head(hidden).log_softmax(-1), teacher.softmax(-1)
        ce = -log_q.gather(2, target[..., None])[..., 0]
        return ((0.3 * ce + 0.7 * (p * (p.log() - log_q)).sum(-1)) * weight).sum()


def test_a_masked_loss_is_that_of_the_learnt_targets(seed: int) -> None:
    case, share = Case(seed), 0.4
    weight = case.kept.double() / (ROWS * SEQ * share)
    loss, expected = case.terms(Mask(case.kept, share))[0], case.reference(weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(case.gradients(loss), case.gradients(expected), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)
    assert case.terms(None)[0].item() != pytest.approx(expected.item(), rel=1e-3), "the mask matters here"


def test_all_learnt_is_no_mask(seed: int) -> None:
    case = Case(seed)
    assert torch.equal(case.terms(Mask(torch.ones(ROWS, SEQ, dtype=torch.bool), 1.0)), case.terms(None))


def test_nothing_learnt_is_no_loss(seed: int) -> None:
    case = Case(seed)
    terms = case.terms(Mask(torch.zeros(ROWS, SEQ, dtype=torch.bool), 0.4))
    assert terms.tolist() == [0.0] * len(terms)
    assert not any(g.any() for g in case.gradients(terms[0]))


def test_which_targets_are_learnt_is_asked_of_no_device(seed: int) -> None:
    """A meta tensor has no values, so whatever would wait for a device to learn some fails on it."""
    case = Case(seed)
    model, hidden = case.student.model.to("meta"), torch.empty(ROWS, SEQ, SHAPE["hidden_size"], device="meta").double()
    ids, teacher = case.ids.to("meta"), Dense(case.teacher.to("meta"))
    terms = head_loss(model, hidden, ids, MIXTURE, teacher, Mask(case.kept, 0.4))
    assert terms.is_meta and terms.shape == (3,)
    with pytest.raises((NotImplementedError, RuntimeError)):
        head_loss(model, hidden, ids, MIXTURE, teacher, Mask(case.kept.to("meta"), 0.4))
