"""Top-k soft labels: the k most likely ids with log-probabilities, and the mass of the tail. Renormalised only on request.

Log-probabilities are kept at temperature 1 in fp16, and for every temperature the log-normaliser of all logits and the
exact tail mass: sum p^(1/tau) cannot be rebuilt from k values and what they leave over.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import torch

from orchestrator.errors import SpecError
from orchestrator.labels.answer import Answer
from orchestrator.labels.layout import Arrays, Frame, tempered
from orchestrator.labels.packing import TopkPacking
from orchestrator.labels.targets import Sparse
from orchestrator.spec.labels import TopkLabels


class Topk(TopkPacking):
    def __init__(self, spec: TopkLabels, frame: Frame) -> None:
        if spec.k > frame.vocab_size:
            raise SpecError(f"labels.k: {spec.k} exceeds the vocabulary of {frame.vocab_size}")
        super().__init__(spec, frame.shape)
        self._spec = spec

    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """`ids`, ascending in each position, `logprobs` [rows, seq, k] and, for every temperature, `log_z` and `tail`."""
        kept: dict[str, list[torch.Tensor]] = {}
        for logits in answer.logits():
            log_probs = logits.log_softmax(-1)
            ids = log_probs.topk(self._spec.k, -1).indices.sort(-1).values
            top = log_probs.gather(-1, ids)
            found = {"ids": ids, "logprobs": top}
            for t in self._spec.temperatures:
                log_z = (log_probs / t).logsumexp(-1)
                tail = 1 - (top / t - log_z[:, None]).exp().sum(-1)
                found |= {tempered("log_z", t): log_z, tempered("tail", t): tail.clamp(0, 1)}
            for name, values in found.items():
                kept.setdefault(name, []).append(values.cpu())
        whole = {name: torch.cat(parts).unflatten(0, (len(answer.states), -1)).numpy() for name, parts in kept.items()}
        return whole | {"logprobs": whole["logprobs"].astype("<f2")}

    def targets(self, arrays: Arrays, temperature: float) -> Sparse:
        """Targets [rows, seq, k] with the tail's mass [rows, seq], or scaled to one without it where the job asks for that."""
        ids = torch.from_numpy(arrays["ids"]).long()
        log_probs = torch.from_numpy(arrays["logprobs"]).float() / temperature
        if self._spec.renormalize:
            return Sparse(ids, log_probs.softmax(-1), tail=None)
        tail = torch.from_numpy(arrays[tempered("tail", temperature)])
        probs = (log_probs - torch.from_numpy(arrays[tempered("log_z", temperature)])[..., None]).exp()
        # fp16 rounding moves the k probabilities by up to 2^-11 of their exponent; the exact tail says what they sum to.
        probs *= ((1 - tail) / probs.sum(-1).clamp_min(1e-30))[..., None]
        return Sparse(ids, probs, tail)
