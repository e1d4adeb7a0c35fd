"""What the chunked head costs beside Liger's chunked loss and beside full logits: CPU-seconds and extra memory.

    make bench-head     prints one JSON line last and writes it to tests/bench/results/head.json

One thread, forward and backward by the hidden states and the head's weight, every variant in a process of its own:

    jsd, forward_kl     0.5 CE + 0.5 divergence to a teacher given as hidden states with its own head's weight
    sampled             0.5 CE + 0.5 forward KL to 50 draws from the teacher, ids with counts (Liger has nothing like it)

Extra memory is the peak of the resident set over the call less what was resident right before it. Inputs exist by then;
the gradients of weight and hidden states do not, so every variant pays for them. `gradients_mb` is their size as they are
handed over, the floor for everybody. Liger runs at its default chunk size and at a small one, and ours is compared with the
better of the two in each figure. Tensors are scaled so that the distributions have a few nats of entropy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from envs import liger_path
from fresh import fresh
from keep import keep, machine
from labels import merged
from memory import peak, reset_peak

from orchestrator.labels.sampled import draw
from orchestrator.labels.targets import Hidden, Sparse, Targets
from orchestrator.losses.divergence import forward_kl, jsd
from orchestrator.losses.head import Head, chunked_loss
from orchestrator.losses.objective import Mixture

Tensor = torch.Tensor
Loss = Callable[["Case"], Tensor]

TOKENS, VOCABS = 1024, (32768, 262144)
WIDTH, TEACHER_WIDTH = 640, 1024
SAMPLES = 50
ALPHA = 0.5
LIGER_CHUNKS = {"liger": 1024, "liger_small_chunks": 128}
"""Positions at a time: its default, and a setting that saves memory."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA = {"jsd": 0.5, "forward_kl": 0.0}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of ours and full logits, relative to the largest entry."""
LIGER_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
"""Liger's divergence is made of log-probabilities in the dtype of the weights."""
CHECKED_TOKENS, CHECKED_VOCAB = 192, 32768


class Case:
    """Inputs of one call: the student's hidden states and head, hard labels and what the teacher says."""

    def __init__(self, loss: str, tokens: int, vocab: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.loss, self.tokens = loss, tokens
        self.hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
        self.weight = torch.randn(vocab, WIDTH).mul_(2 / math.sqrt(WIDTH)).to(dtype).requires_grad_()
        self.labels = torch.randint(vocab, (tokens,))
        self.teacher: Targets
        if loss == "sampled":
            self.teacher = _draws(tokens, vocab)
        else:
            weight = torch.randn(vocab, TEACHER_WIDTH).mul_(3.5 / math.sqrt(TEACHER_WIDTH)).to(dtype)
            self.teacher = Hidden(torch.randn(tokens, TEACHER_WIDTH).to(dtype), Head(weight))

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def run(self, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Value and gradients by the hidden states and by the weight."""
        value = loss(self)
        return (value.detach(), *torch.autograd.grad(value, self.inputs))


def _draws(tokens: int, vocab: int) -> Sparse:
    parts = []
    for start in range(0, tokens, 64):
        n = min(64, tokens - start)
        points = (torch.arange(SAMPLES) + torch.rand(n, 1, dtype=torch.float64)) / SAMPLES
        parts.append(draw(torch.randn(n, vocab).mul_(3.5), points))
    return merged(torch.cat(parts), vocab)


def ours(case: Case) -> Tensor:
    divergence = (lambda p, q: jsd(p, q, BETA[case.loss])) if case.loss in BETA else forward_kl
    mixture = Mixture(ALPHA, 1 - ALPHA, divergence=divergence)

    def score(logits: Tensor, part: slice) -> Tensor:
        return mixture.score(logits, case.labels[part], case.teacher.map(lambda entry: entry[part]))

    return chunked_loss(case.hidden, Head(case.weight), score)[0] / case.tokens


def full(case: Case) -> Tensor:
    """Plain torch: all logits, log-softmax in fp32, autograd."""
    student = torch.nn.functional.linear(case.hidden, case.weight).float().log_softmax(-1)
    hard = torch.nn.functional.nll_loss(student, case.labels)
    kl = torch.nn.functional.kl_div
    if isinstance(case.teacher, Sparse):
        soft = kl(student.gather(1, case.teacher.ids), case.teacher.probs, reduction="batchmean")
    else:
        assert isinstance(case.teacher, Hidden)
        teacher = case.teacher.head(case.teacher.states).log_softmax(-1)
        beta = BETA[case.loss]
        if beta == 0:
            soft = kl(student, teacher, reduction="batchmean", log_target=True)
        else:
            middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
            soft = beta * kl(middle, teacher, reduction="batchmean", log_target=True)
            soft = soft + (1 - beta) * kl(middle, student, reduction="batchmean", log_target=True)
    return ALPHA * hard + (1 - ALPHA) * soft


def liger(chunk: int) -> Loss:
    """Its hard and soft losses are means over positions, its JSD weighs the teacher by beta as ours does."""
    sys.path.append(str(liger_path()))
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    def loss(case: Case) -> Tensor:
        assert isinstance(case.teacher, Hidden) and isinstance(case.teacher.head, Head)
        module = LigerFusedLinearJSDLoss(ALPHA, 1 - ALPHA, beta=BETA[case.loss], compiled=False, chunk_size=chunk)
        return module(case.hidden, case.weight, case.teacher.states, case.teacher.head.weight, case.labels)

    return loss


def variant(name: str) -> Loss:
    return {"ours": ours, "full": full}.get(name) or liger(LIGER_CHUNKS[name])


def measure(name: str, loss: str, tokens: int, vocab: int, dtype: str, repeat: int) -> dict[str, Any]:
    """Memory of the first call of this size, CPU-seconds of those after it."""
    function = variant(name)
    Case(loss, 8, 256, DTYPES[dtype]).run(function)
    case = Case(loss, tokens, vocab, DTYPES[dtype])
    before = reset_peak()
    value, *gradients = case.run(function)
    extra = peak() - before
    result = {
        "extra_mb": round(extra / 2**20, 1),
        "gradients_mb": round(sum(g.nbytes for g in gradients) / 2**20, 1),
        "value": float(value),
        "gradient_norms": [float(torch.linalg.vector_norm(g, dtype=torch.float32)) for g in gradients],
    }
    del value, gradients
    seconds = []
    for _ in range(repeat):
        started = time.process_time()
        case.run(function)
        seconds.append(time.process_time() - started)
    return {**result, "cpu_s": round(min(seconds), 3), "cpu_s_median": round(statistics.median(seconds), 3)}


def check(loss: str, dtype: str) -> dict[str, float]:
    """Largest difference from full logits in fp32 of the same inputs, by variant: of value and gradients, relative."""
    case = Case(loss, CHECKED_TOKENS, CHECKED_VOCAB, DTYPES[dtype])
    got = {name: [g.float() for g in case.run(variant(name))] for name in variants(loss)}
    case.hidden, case.weight = (t.detach().float().requires_grad_() for t in case.inputs)
    if isinstance(case.teacher, Hidden):
        assert isinstance(case.teacher.head, Head)
        case.teacher = Hidden(case.teacher.states.float(), Head(case.teacher.head.weight.float()))
    exact = case.run(full)
    errors = {name: max(_relative(g, e) for g, e in zip(found, exact, strict=True)) for name, found in got.items()}
    for name, error in errors.items():
        limit = (LIGER_TOLERANCE if name in LIGER_CHUNKS else TOLERANCE)[dtype]
        if error > limit:
            raise SystemExit(f"{name}, {loss}, {dtype}: off by {error:.1e} of the largest entry; allowed: {limit}")
    return errors


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def variants(loss: str) -> list[str]:
    return ["ours", *(LIGER_CHUNKS if loss in BETA else ()), "full"]


def compared(by_variant: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over the others: below 1 is cheaper. Of Liger's settings, the better in each figure."""
    ours, ratios = by_variant["ours"], {}
    peers = {"full": [by_variant["full"]], "liger": [by_variant[n] for n in LIGER_CHUNKS if n in by_variant]}
    for peer, runs in peers.items():
        for figure in ("cpu_s", "cpu_s_median", "extra_mb"):
            if runs:
                ratios[f"{figure}_over_{peer}"] = round(ours[figure] / min(r[figure] for r in runs), 3)
    if peers["liger"]:
        ratios["extra_mb_over_liger_default"] = round(ours["extra_mb"] / by_variant["liger"]["extra_mb"], 3)
    return ratios


def worker(what: str, *arguments: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"check": check, "measure": measure}[what](*arguments)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "machine": machine(),
        "widths": {"student": WIDTH, "teacher": TEACHER_WIDTH},
        "liger_chunks": LIGER_CHUNKS,
        "errors": {},
        "cases": [],
    }
    for dtype in args.dtypes:
        for loss in args.losses:
            result["errors"][f"{loss} {dtype}"] = fresh(__file__, "--worker", ["check", loss, dtype])
    for vocab in args.vocabs:
        for dtype in args.dtypes:
            for loss in args.losses:
                load, tokens = os.getloadavg()[0], args.tokens
                runs = {
                    n: fresh(__file__, "--worker", ["measure", n, loss, tokens, vocab, dtype, args.repeat])
                    for n in variants(loss)
                }
                case = {"vocab": vocab, "tokens": tokens, "dtype": dtype, "loss": loss, "load": load}
                result["cases"].append({**case, "ratios": compared(runs), "runs": runs})
                print(json.dumps(result["cases"][-1]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--losses", nargs="+", choices=[*BETA, "sampled"], default=[*BETA, "sampled"])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*args.worker)))
        return
    liger_path()
    result = compare(args)
    keep("head", result)


if __name__ == "__main__":
    main()
