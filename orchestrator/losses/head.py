"""The chunked head: loss and gradients from the last hidden state, nothing of size [tokens, vocab] ever alive.

A chunk of positions at a time: logits, loss and its gradient by the logits in place, then both gradient GEMMs at once,
because the logits are not there any more when backward comes. Softmax and loss are fp32; the GEMMs run in the dtype of
their inputs and the weight's gradient accumulates in fp32.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.plan.memory import head_rows

Tensor = torch.Tensor

VOCAB_BLOCK = 1024
"""Ids whose part of the weight's gradient is made at a time where the GEMM does not run in fp32 itself; stays in cache."""

NARROWED_AT_A_TIME = 1 << 20

Score = Callable[[Tensor, slice], Tensor]
"""(logits [c, vocab] fp32, which positions they are) to the terms' sums [t], the loss first; overwrites the logits with the
gradient of the loss."""


class Buffers:
    """Room for the logits of one chunk, in the dtype of the weight and in fp32: used again, a fresh page costs a fault."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.wide = weight.new_empty((rows, len(weight)), dtype=_at_least_fp32(weight.dtype))
        self.narrow = self.wide if weight.dtype == self.wide.dtype else weight.new_empty((rows, len(weight)))

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        wide = self.wide[:count]
        return wide, wide if self.narrow is self.wide else self.narrow[:count]


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor
    """[vocab, width]"""
    bias: Tensor | None = None
    """[vocab]"""
    scale: float = 1.0
    softcap: float | None = None
    """Logits are squashed into (-softcap, softcap) by tanh, as Gemma 2 does."""

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    @torch.no_grad()
    def __call__(self, hidden: Tensor, buffers: Buffers | None = None) -> Tensor:
        """Logits [..., vocab], fp32, of `hidden` [..., width]; `buffers`, if given, take those of [n, width]."""
        hidden = hidden.to(self.weight.dtype)
        if buffers is None:
            logits = torch.nn.functional.linear(hidden, self.weight).to(_at_least_fp32(self.weight.dtype))
        else:
            logits, narrow = buffers.rows(len(hidden))
            torch.mm(hidden, self.weight.T, out=narrow)
            if narrow is not logits:
                logits.copy_(narrow)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """The `gradient` by the logits, in place, as that by hidden @ weight.T; `logits` are needed under a softcap."""
        if self.softcap is not None:
            assert logits is not None
            gradient.addcmul_(gradient * logits, logits, value=-1 / self.softcap**2)
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


def chunked_loss(hidden: Tensor, head: Head, score: Score) -> Tensor:
    """Sums of the loss and its terms, [t], from `hidden` [n, width]; only the first has a gradient."""
    needs = torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, score, needs)  # pyright: ignore[reportReturnType]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, score: Score, needs: bool) -> Tensor:
        by_hidden = torch.empty_like(hidden) if needs and hidden.requires_grad else None
        by_weight = torch.zeros_like(weight, dtype=_at_least_fp32(weight.dtype)) if needs and weight.requires_grad else None
        by_bias = (
            torch.zeros_like(bias, dtype=_at_least_fp32(bias.dtype))
            if needs and bias is not None and bias.requires_grad
            else None
        )
        sums: Tensor | None = None
        positions = max(1, len(hidden))  # a batch of prompts alone has no target, and a loss of zero
        rows = min(head_rows(len(weight), weight.is_cuda), positions)
        buffers = Buffers(weight, rows)
        for start in range(0, positions, rows):
            part = slice(start, min(start + rows, len(hidden)))
            logits = head(hidden[part], buffers)
            capped = logits.clone() if head.softcap is not None and needs else None
            terms = score(logits, part)
            sums = terms if sums is None else sums + terms
            if not needs:
                continue
            gradient = head.backward(logits, capped)
            if by_bias is not None:
                by_bias += gradient.sum(0)
            narrow = buffers.rows(len(gradient))[1]
            gradient = gradient if gradient.dtype == narrow.dtype else narrow.copy_(gradient)
            if by_hidden is not None:
                torch.mm(gradient, weight, out=by_hidden[part])
            if by_weight is not None:
                _accumulate(by_weight, gradient, hidden[part].to(weight.dtype))
        assert sums is not None
        ctx.gradients = (
            by_hidden,
            None if by_weight is None else _narrowed(by_weight, weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
        )
        return sums

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        scale = outputs[0][0]
        by_input = [None if g is None else g.mul_(scale) for g in ctx.gradients]
        ctx.gradients = None
        return (*by_input, None, None, None)


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient.T @ hidden, in fp32"""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    elif total.is_cuda:
        total += gradient.T @ hidden
    else:
        product = hidden.new_empty((VOCAB_BLOCK, hidden.shape[1]))
        wide = torch.empty_like(product, dtype=total.dtype)
        for start in range(0, len(total), VOCAB_BLOCK):
            block = total[start : start + VOCAB_BLOCK]
            torch.mm(gradient[:, start : start + VOCAB_BLOCK].T, hidden, out=product[: len(block)])
            block += wide[: len(block)].copy_(product[: len(block)])


def _narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide` in `dtype`, written over itself: beside a large weight's gradient there is no room for a copy."""
    if wide.dtype == dtype:
        return wide
    flat = wide.view(-1)
    narrow = flat.view(dtype)[: len(flat)]
    for start in range(0, len(flat), NARROWED_AT_A_TIME):
        block = slice(start, start + NARROWED_AT_A_TIME)
        narrow[block] = flat[block].to(dtype)
    return narrow.view(wide.shape)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
