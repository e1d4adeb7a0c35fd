"""Top-k soft labels: the k most likely ids with log-probabilities, and the mass of the tail. Never renormalised.

Log-probabilities are kept at temperature 1 in fp16, and for every temperature the log-normaliser of all logits and the
exact tail mass: sum p^(1/tau) cannot be rebuilt from k values and what they leave over.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import numpy as np
import torch

from orchestrator.errors import SpecError
from orchestrator.labels.targets import Columns, SparseTargets, column, finite, id_width, pack_ids, unpack_ids
from orchestrator.spec.distill import TopkLabels


class Topk:
    def __init__(self, spec: TopkLabels, vocab_size: int) -> None:
        if spec.k > vocab_size:
            raise SpecError(f"labels.k: {spec.k} exceeds the vocabulary of {vocab_size}")
        self._spec = spec
        self._width = id_width(vocab_size)

    def encode(self, logits: torch.Tensor, seeds: list[bytes]) -> Columns:
        """Columns `ids`, `logprobs` and, for every temperature, `log_z` and `tail`. `logits`: [rows, seq, vocab]."""
        finite(logits)
        columns: Columns = {"ids": [], "logprobs": []}
        for temperature in self._spec.temperatures:
            columns[column("log_z", temperature)] = []
            columns[column("tail", temperature)] = []
        for row in logits:
            log_probs = row.float().log_softmax(-1)
            top, ids = log_probs.topk(self._spec.k, -1)
            columns["ids"].append(pack_ids(ids.cpu().numpy(), self._width))
            columns["logprobs"].append(top.cpu().numpy().astype("<f2").tobytes())
            for temperature in self._spec.temperatures:
                log_z = (log_probs / temperature).logsumexp(-1)
                tail = 1 - (top / temperature - log_z[:, None]).exp().sum(-1)
                columns[column("log_z", temperature)].append(log_z.cpu().numpy().astype("<f4").tobytes())
                columns[column("tail", temperature)].append(tail.clamp(0, 1).cpu().numpy().astype("<f4").tobytes())
        return columns

    def decode(self, columns: Columns, temperature: float) -> SparseTargets:
        """Targets [rows, seq, k] with the tail's mass [rows, seq]."""
        rows, k = len(columns["ids"]), self._spec.k
        ids = unpack_ids(columns["ids"], self._width).reshape(rows, -1, k)
        log_probs = _floats(columns["logprobs"], "<f2").reshape(rows, -1, k)
        log_z = _floats(columns[column("log_z", temperature)], "<f4").reshape(rows, -1, 1)
        tail = _floats(columns[column("tail", temperature)], "<f4").reshape(rows, -1)
        probs = torch.exp(log_probs / temperature - log_z)
        # fp16 rounding moves the k probabilities by up to 2^-11 of their exponent; the exact tail says what they sum to.
        probs *= ((1 - tail) / probs.sum(-1).clamp_min(1e-30))[..., None]
        return SparseTargets(torch.from_numpy(ids), probs, tail)


def _floats(blobs: list[bytes], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(blobs), dtype=dtype).astype(np.float32))
