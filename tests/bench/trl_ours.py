"""Training steps with the orchestrator's pieces, in a plain loop: online from a teacher, or from labels drawn beforehand.

python trl_ours.py CASE online|cached medium|bf16 STEPS BATCH RATE
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak
from transformers import AutoModelForCausalLM

from orchestrator.labels.targets import Hidden, Sparse, Targets
from orchestrator.losses.divergence import forward_kl
from orchestrator.losses.head import Head, chunked_loss
from orchestrator.losses.objective import Mixture

Tensor = torch.Tensor
Ask = Callable[[slice, Tensor], Targets]
"""(which rows, their tokens) to the targets of all positions but each row's last, flat."""

WARM = 2
KL = Mixture(alpha=0.0, soft_weight=1.0, divergence=forward_kl)


class Teacher:
    def __init__(self, case: Path, bf16: bool) -> None:
        self._model = load(case / "teacher", torch.bfloat16 if bf16 else torch.float32).eval()

    @torch.no_grad()
    def __call__(self, _: slice, tokens: Tensor) -> Hidden:
        states = self._model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        return Hidden(states.flatten(0, 1), Head(self._model.lm_head.weight))


class Cache:
    def __init__(self, case: Path) -> None:
        with np.load(case / "labels.npz") as packed:
            self._n, self._starts, self._ids, self._counts = (packed[k] for k in ("n", "starts", "ids", "counts"))

    def __call__(self, rows: slice, _: Tensor) -> Sparse:
        unique = self._n[rows].reshape(-1, 1)
        entries = slice(self._starts[rows.start], self._starts[rows.stop])
        places = np.arange(int(unique.max())) < unique
        ids = np.zeros(places.shape, dtype=np.int64)
        counts = np.zeros(places.shape, dtype=np.float32)
        ids[places] = self._ids[entries]
        counts[places] = self._counts[entries]
        counts /= counts.sum(1, keepdims=True)
        return Sparse(torch.from_numpy(ids), torch.from_numpy(counts), tail=None)


def load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def loss_of(student: Any, tokens: Tensor, teacher: Targets, bf16: bool) -> Tensor:
    """Mean KL over the positions; in bf16 the student's GEMMs, the head's with them, run in it on weights kept in fp32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        states = student.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    weight, labels = student.lm_head.weight, tokens[:, 1:].flatten()
    if bf16:
        states, weight = states.to(torch.bfloat16), weight.to(torch.bfloat16)

    def score(logits: Tensor, part: slice) -> Tensor:
        return KL.score(logits, labels[part], teacher.map(lambda entry: entry[part]))

    return chunked_loss(states, Head(weight), score)[0] / len(labels)


def train(case: Path, ask: Ask, bf16: bool, steps: int, batch: int, rate: float) -> dict[str, Any]:
    tokens = torch.from_numpy(np.load(case / "tokens.npy")).long()
    student = load(case / "student", torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0, fused=True)
    losses, cpu, wall = [], 0.0, 0.0
    for step in range(WARM + steps):
        if step == WARM:
            cpu, wall = time.process_time(), time.perf_counter()
        rows = slice(step * batch, (step + 1) * batch)
        loss = loss_of(student, tokens[rows], ask(rows, tokens[rows]), bf16)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    trained = steps * batch * tokens.shape[1]
    return {"tokens_per_cpu_s": trained / cpu, "tokens_per_s": trained / wall, "peak_mb": peak() / 2**20, "losses": losses}


def main() -> None:
    case, mode, precision, steps, batch, rate = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    bf16 = precision == "bf16"
    ask = Teacher(Path(case), bf16) if mode == "online" else Cache(Path(case))
    print(json.dumps(train(Path(case), ask, bf16, int(steps), int(batch), float(rate))))


if __name__ == "__main__":
    main()
