"""A model with its objective: token ids and soft labels in, loss out."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from orchestrator.errors import SpecError
from orchestrator.labels.targets import Targets
from orchestrator.losses.head import chunked_loss
from orchestrator.losses.inner import InnerLoss, links
from orchestrator.losses.objective import Mixture
from orchestrator.models.build import build_model, load_model, model_config, outline
from orchestrator.models.features import captured, feature_widths, layer_count
from orchestrator.models.fp8 import fp8_hardware, to_fp8
from orchestrator.models.head import check_head, last_hidden, output_head, trial_model
from orchestrator.models.mtp import MultiTokenPrediction, shifted
from orchestrator.models.share import Share, drawn_share, read_share
from orchestrator.models.stages import check_pieces
from orchestrator.spec.labels import kept_features
from orchestrator.spec.train import Pipeline
from orchestrator.store.files import local_folder
from orchestrator.student.feed import Mask
from orchestrator.student.job import Initial, Soft, TrainingJob
from orchestrator.student.ranks import from_first_rank

TERMS = 5
"""Means over the global batch that a step reports: loss, CE, divergence, features' loss, loss of multi-token prediction."""


class Distiller(nn.Module):
    """A causal LM, and what is learnt beside it: projectors of its objective, multi-token-prediction modules."""

    def __init__(
        self, model: PreTrainedModel, inner: InnerLoss | None, mtp: MultiTokenPrediction | None, mtp_weight: float
    ) -> None:
        super().__init__()
        self.model = model
        self.inner = inner
        self.mtp = mtp
        self._mtp_weight = mtp_weight

    def forward(
        self,
        ids: torch.Tensor,
        mixture: Mixture,
        soft: Targets | None,
        features: dict[str, torch.Tensor],
        mask: Mask | None = None,
    ) -> torch.Tensor:
        """Means over the targets of `TERMS`, [5]; only the first has a gradient.

        `ids` are [rows, seq + 1], `soft` and the teacher's `features` have tensors [rows, seq, ...], the `mask` is on the CPU.
        Features are compared at all positions, those of a prompt too. In evaluation mode the model itself is measured, and
        nothing beside it.
        """
        names = self.inner.student_features if self.inner is not None and self.training else ()
        with captured(self.model, names, "objective.features") as own:
            hidden = last_hidden(self.model, ids[:, :-1])
        loss, ce, divergence = head_loss(self.model, hidden, ids, mixture, soft, mask)
        inner = ahead = torch.zeros_like(ce)
        if self.inner is not None and self.training:
            inner = self.inner(features, own)
        if self.mtp is not None and self.training:
            ahead = self._mtp_weight * self._mtp_loss(hidden, ids, mixture, soft, mask)
        return torch.stack([loss + inner + ahead, ce, divergence, inner.detach(), ahead.detach()])

    def _mtp_loss(
        self, hidden: torch.Tensor, ids: torch.Tensor, mixture: Mixture, soft: Targets | None, mask: Mask | None
    ) -> torch.Tensor:
        """Mean over the depths of the same objective, hard and soft labels moved on by the depth."""
        assert self.mtp is not None
        losses: list[torch.Tensor] = []
        for depth, states in enumerate(self.mtp(hidden, ids), 1):
            later = None if soft is None else soft.map(lambda t, d=depth: t[:, shifted(d, hidden.shape[1])])
            learnt = None if mask is None else mask.map(lambda t, d=depth: t[:, shifted(d, hidden.shape[1])])
            losses.append(head_loss(self.model, states, ids[:, depth:], mixture, later, learnt)[0])
        return torch.stack(losses).mean()


def head_loss(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    mixture: Mixture,
    soft: Targets | None,
    mask: Mask | None = None,
) -> torch.Tensor:
    """Means over the targets of (loss, CE, divergence), [3]; only the first has a gradient.

    `hidden` [rows, seq, width] is what the head of `model` is applied to, `ids` are [rows, seq + 1]. The `mask` is on the CPU.
    """
    states, target = hidden.flatten(0, 1), ids[:, 1:].flatten()
    teacher = None if soft is None else soft.map(lambda t: t.flatten(0, 1))
    count = float(len(target))
    if mask is not None:
        # Which they are is told by the CPU: to ask the device how many would be to wait for all that it has still to do.
        rows = mask.kept.flatten().nonzero().squeeze(1).to(states.device, non_blocking=True)
        states, target, count = states.index_select(0, rows), target.index_select(0, rows), count * mask.share
        teacher = None if teacher is None else teacher.map(lambda t: t.index_select(0, rows))

    def score(logits: torch.Tensor, part: slice) -> torch.Tensor:
        return mixture.score(logits, target[part], None if teacher is None else teacher.map(lambda t: t[part]))

    return chunked_loss(states, output_head(model), score) / count


def start_model(job: TrainingJob, share: Share | None = None) -> PreTrainedModel:
    """The model of `job` as training begins, or a `share` of it, on the CPU and in fp32.

    With a `share` it is called on every rank. Raises `SpecError` for a model whose head the chunked loss cannot stand for.
    """
    if share is None:
        model = _whole_model(job)
        _check_architecture(job, model)
    else:
        config = _config(job)
        if refused := from_first_rank(lambda: _refused(job, config)):  # one answer for all: they end together
            raise SpecError(refused)
        model = _shared_model(job, config, share)
    learn_every_row(model)
    if job.train.precision == "fp8":
        emulate = job.train.gpus_per_worker == 0 or not fp8_hardware()
        to_fp8(model, job.train.fp8_recipe, emulate, f"{job.stage}.model")
    if job.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def learn_every_row(model: nn.Module) -> None:
    """Have the embeddings of `model` learn the row of their padding id too.

    Windows hold no padding. The id that a checkpoint pads with is often the end of text, which stands between all documents.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def _whole_model(job: TrainingJob) -> PreTrainedModel:
    if isinstance(job.model, Initial):
        return load_model(local_folder(job.model.folder), "fp32", torch.device("cpu")).train()
    return build_model(job.model, job.vocab_size, job.seed, job.stage)


def _shared_model(job: TrainingJob, config: PreTrainedConfig, share: Share) -> PreTrainedModel:
    if isinstance(job.model, Initial):
        return read_share(local_folder(job.model.folder), share)
    return drawn_share(config, job.seed, share)


def _config(job: TrainingJob) -> PreTrainedConfig:
    if isinstance(job.model, Initial):
        return outline(local_folder(job.model.folder)).config
    return model_config(job.model, job.vocab_size, job.stage)


def _refused(job: TrainingJob, config: PreTrainedConfig) -> str | None:
    """Why a model of `config` cannot be trained, if it cannot."""
    try:
        _check_architecture(job, trial_model(config))
    except SpecError as error:
        return str(error)
    return None


def _check_architecture(job: TrainingJob, model: PreTrainedModel) -> None:
    check_head(model, job.stage)
    if job.ahead.depth or isinstance(job.train.parallel, Pipeline):
        check_pieces(model, job.stage)


def build_distiller(job: TrainingJob, share: Share | None = None) -> Distiller:
    """The model of `job`, or a `share` of it, as training begins, with what its objective learns beside it.

    Raises `SpecError` as `start_model` does, and for features that are not there.
    """
    model = start_model(job, share)
    inner = _inner_loss(job.soft, model, job.seed) if job.soft and job.soft.objective.features else None
    mtp = MultiTokenPrediction(model, job.ahead.depth, job.seed) if job.ahead.depth else None
    return Distiller(model, inner, mtp, job.ahead.weight)


def _inner_loss(soft: Soft, model: PreTrainedModel, seed: int) -> InnerLoss:
    teacher = outline(local_folder(soft.teacher))
    linked = links(soft.objective.features, layer_count(model), layer_count(teacher))
    missing = [link.teacher for link in linked if link.teacher not in kept_features(soft.labels)]
    if missing:
        raise SpecError(f"objective.features: needs {missing[0]}, which labels.features does not keep")
    ours = feature_widths(model, {link.student for link in linked}, "objective.features")
    theirs = feature_widths(teacher, {link.teacher for link in linked}, "objective.features")
    return InnerLoss(linked, ours, theirs, seed)
