"""What a loss and its gradients are in dense float64 probabilities, and the cases in which the chunked head is held to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.labels.answer import Answer
from orchestrator.labels.kinds import label_kind
from orchestrator.labels.layout import Frame
from orchestrator.labels.targets import Dense, Sparse, Targets
from orchestrator.losses.head import Head, chunked_loss
from orchestrator.losses.objective import Mixture
from orchestrator.spec.labels import DenseLabels, HiddenLabels, Labels, SampledLabels, TopkLabels
from orchestrator.spec.objective import AdaptiveKl, Divergence, ForwardKl, Jsd, ReverseKl, ReverseSkewKl, SkewKl, TotalVariation

Tensor = torch.Tensor
VOCAB, WIDTH, TEACHER_WIDTH, POSITIONS = 61, 6, 9, 25
TEMPERATURES = (1.0, 2.0)
LABELS: dict[str, Labels] = {
    "sampled": SampledLabels(temperatures=TEMPERATURES),
    "topk": TopkLabels(kind="topk", k=8, temperatures=TEMPERATURES),
    "renormalized": TopkLabels(kind="topk", k=8, temperatures=TEMPERATURES, renormalize=True),
    "dense": DenseLabels(kind="dense", dtype="fp32"),
    "hidden": HiddenLabels(kind="hidden"),
}
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKl(),
    "reverse_kl": ReverseKl(kind="reverse_kl"),
    "jsd": Jsd(kind="jsd", beta=0.3),
    "jsd-0": Jsd(kind="jsd", beta=0.0),
    "jsd-1": Jsd(kind="jsd", beta=1.0),
    "skew_kl": SkewKl(kind="skew_kl", skew=0.1),
    "reverse_skew_kl": ReverseSkewKl(kind="reverse_skew_kl", skew=0.2),
    "tvd": TotalVariation(kind="tvd"),
    "akl": AdaptiveKl(kind="akl", head_mass=0.5),
}
ALLOWED = [
    (labels, name)
    for labels in LABELS
    for name in DIVERGENCES
    if labels not in ("sampled", "renormalized") or name == "forward_kl"
]
HEADS = {"plain": (False, 1.0, None), "bias": (True, 1.0, None), "scaled": (False, 0.7, None), "capped": (True, 1.3, 4.0)}


@dataclass(frozen=True)
class Case:
    """A student's hidden states and head, hard labels, and the teacher's hidden states and head, in float64."""

    hidden: Tensor
    head: Head
    target: Tensor
    teacher_states: Tensor
    teacher_head: Head

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_head(self.teacher_states)

    def logits(self) -> Tensor:
        """The student's, written out once more, so that autograd sees it."""
        z = self.hidden @ self.head.weight.T
        z = self.head.scale * (z if self.head.bias is None else z + self.head.bias)
        return z if self.head.softcap is None else self.head.softcap * torch.tanh(z / self.head.softcap)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.head.weight, self.head.bias) if t is not None]


def make_case(seed: int, head: str = "plain", scale: float = 3.0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    bias, factor, softcap = HEADS[head]
    student = Head(normal(VOCAB, WIDTH).requires_grad_(), normal(VOCAB).requires_grad_() if bias else None, factor, softcap)
    target = torch.randint(VOCAB, (POSITIONS,), generator=generator)
    teacher = Head(normal(VOCAB, TEACHER_WIDTH))
    return Case(
        normal(POSITIONS, WIDTH).requires_grad_(), student, target, normal(POSITIONS, TEACHER_WIDTH) * scale / 3, teacher
    )


def soft_labels(case: Case, labels: str, temperature: float, salt: str = "") -> Targets:
    """What the codec of `labels` keeps of the teacher, one row of all positions, flattened."""
    kind = label_kind(LABELS[labels], Frame(VOCAB, POSITIONS, case.teacher_head))
    answer = Answer(case.teacher_states[None], case.teacher_head, VOCAB)
    arrays = kind.extract(answer, [f"row{salt}".encode().ljust(16)])
    targets = kind.targets(kind.unpack(kind.pack(arrays)), temperature)
    return targets.map(lambda t: t.flatten(0, 1))


def measured(case: Case, mixture: Mixture, soft: Targets | None) -> tuple[Tensor, list[Tensor]]:
    """Sums (loss, CE, divergence) and the loss's gradients through the chunked head."""

    def score(logits: Tensor, part: slice) -> Tensor:
        return mixture.score(logits, case.target[part], None if soft is None else soft.map(lambda t: t[part]))

    sums = chunked_loss(case.hidden, case.head, score)
    return sums.detach(), list(torch.autograd.grad(sums[0], case.leaves))


# The reference: probabilities, float64, no chunks, gradients by autograd through nothing of ours.


def reference_divergence(spec: Any, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 1e-29, a * (a.clamp_min(1e-30) / b).log(), torch.zeros_like(a)).sum(-1)

    if spec.kind == "jsd":
        m = spec.beta * p + (1 - spec.beta) * q
        return {0.0: kl(p, q), 1.0: kl(q, p)}.get(spec.beta, spec.beta * kl(p, m) + (1 - spec.beta) * kl(q, m))
    if spec.kind == "skew_kl":
        return kl(p, spec.skew * p + (1 - spec.skew) * q)
    if spec.kind == "reverse_skew_kl":
        return kl(q, spec.skew * q + (1 - spec.skew) * p)
    if spec.kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    if spec.kind == "akl":
        shares = []
        for a, b in zip(p.tolist(), q.tolist(), strict=True):
            order, mass, head, gaps = np.argsort(a)[::-1], 0.0, 0.0, 0.0
            for i in order:
                gap = abs(a[i] - b[i])
                head, gaps, mass = head + (gap if mass < spec.head_mass else 0.0), gaps + gap, mass + a[i]
            shares.append(head / gaps)
        share = torch.tensor(shares, dtype=torch.float64)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    return kl(p, q) if spec.kind == "forward_kl" else kl(q, p)


def reference_events(soft: Targets, q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's probabilities of the same events."""
    if isinstance(soft, Sparse):
        p = soft.probs.double()
        kept = torch.stack([q[n, ids] for n, ids in enumerate(soft.ids)])
        if soft.tail is None:
            return p, kept
        return torch.cat([p, soft.tail.double()[:, None]], 1), torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
    logits = soft.logits if isinstance(soft, Dense) else soft.head(soft.states)
    return (logits.double() / temperature).softmax(-1), q


def reference(
    case: Case, alpha: float, soft_weight: float, temperature: float, specs: list[Any], soft: Targets
) -> tuple[Tensor, list[Tensor]]:
    z = case.logits()
    ce = -z.softmax(-1)[torch.arange(POSITIONS), case.target].log().sum()
    p, q = reference_events(soft, (z / temperature).softmax(-1), temperature)
    value = sum(spec.weight * reference_divergence(spec, p, q).sum() for spec in specs)
    loss = alpha * ce + soft_weight * value
    gradients = torch.autograd.grad(loss, case.leaves)
    return torch.stack([loss, ce, torch.as_tensor(value)]).detach(), list(gradients)


def agree(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]], rtol: float = 1e-6) -> bool:
    pairs = [(one[0], other[0]), *zip(one[1], other[1], strict=True)]
    return all(torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol * float(b.abs().max())) for a, b in pairs)
