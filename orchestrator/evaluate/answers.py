"""The teacher's answers on the held-out rows that models are measured on, read from its label log without running a teacher."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from orchestrator.errors import IntegrityError
from orchestrator.evaluate.windows import Heldout
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame, join, unpack
from orchestrator.labels.targets import TARGET_LOG_PROBS, Hidden, Sparse, Targets
from orchestrator.models.build import DTYPES
from orchestrator.models.head import load_head
from orchestrator.spec.labels import TopkLabels
from orchestrator.store.files import local_folder
from orchestrator.store.shards import TokenShard

Tensor = torch.Tensor


class Distribution(Protocol):
    """The teacher's predicted distributions at n positions."""

    def entropy(self) -> Tensor:
        """[n], in nats."""
        ...

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Probabilities and ids [n, k] of its most likely ids, most likely first."""
        ...

    def log_probs_of(self, targets: Tensor) -> Tensor:
        """Log-probabilities [n] of `targets` [n], the ids that follow in the text."""
        ...

    def divergence(self, log_probs: Tensor) -> Tensor:
        """KL(teacher ‖ model) [n], in nats, from a model's `log_probs` [n, vocab]."""
        ...


@dataclass(frozen=True)
class Whole:
    """All of a distribution."""

    log_probs: Tensor
    """[n, vocab], fp32"""

    def entropy(self) -> Tensor:
        return torch.special.entr(self.log_probs.exp()).sum(-1)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        log_probs, ids = self.log_probs.topk(k)
        return log_probs.exp(), ids

    def log_probs_of(self, targets: Tensor) -> Tensor:
        return self.log_probs.gather(1, targets[:, None])[:, 0]

    def divergence(self, log_probs: Tensor) -> Tensor:
        return (self.log_probs.exp() * (self.log_probs - log_probs)).sum(-1)


@dataclass(frozen=True)
class Partition:
    """The k most likely ids, and all others as one event.

    Entropy and divergence over these k + 1 events are at most those over the vocabulary (data-processing inequality; Cover and
    Thomas, Elements of Information Theory, 2.8).
    """

    sparse: Sparse
    target_log_probs: Tensor
    """[n]: what the teacher said of the ids that follow in the text, be they among the k or not."""

    def entropy(self) -> Tensor:
        return torch.special.entr(self.sparse.probs).sum(-1) + torch.special.entr(self._tail())

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        probs, places = self.sparse.probs.topk(min(k, self.sparse.probs.shape[1]))
        return probs, self.sparse.ids.gather(1, places)

    def log_probs_of(self, targets: Tensor) -> Tensor:
        return self.target_log_probs

    def divergence(self, log_probs: Tensor) -> Tensor:
        probs, ids, tail = self.sparse.probs, self.sparse.ids, self._tail()
        rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
        cross = (probs * log_probs.gather(1, ids)).sum(-1) + torch.where(tail > 0, tail * rest, 0.0)
        return -cross - self.entropy()

    def _tail(self) -> Tensor:
        assert self.sparse.tail is not None
        return self.sparse.tail


@dataclass(frozen=True)
class Answered:
    """The teacher's answers for the rows of one shard of its log."""

    targets: Targets
    """[rows, seq, ...]"""
    target_log_probs: Tensor | None
    """[rows, seq], where only the teacher's most likely ids are known."""

    def rows(self, some: slice) -> Answered:
        """Some of its rows."""
        log_probs = self.target_log_probs
        return Answered(self.targets.map(lambda t: t[some]), None if log_probs is None else log_probs[some])

    def at(self, chosen: Tensor, on: torch.device) -> Distribution:
        """The distributions at the positions of `chosen` [rows, seq] that are true, in their order, on the device `on`."""
        targets = self.targets.map(lambda t: t[chosen].to(on))
        if isinstance(targets, Sparse):
            assert self.target_log_probs is not None
            return Partition(targets, self.target_log_probs[chosen].to(on))
        assert isinstance(targets, Hidden)
        return Whole(targets.head(targets.states).log_softmax(-1))


class TeacherAnswers:
    """The answers in the log of `heldout`, with what it takes to make distributions of them on the device `on`."""

    def __init__(
        self, heldout: Heldout, folder: str, dtype: Literal["bf16", "fp32"], vocab_size: int, on: torch.device
    ) -> None:
        """`folder` is the address of the teacher's, of which nothing but the head is read."""
        labels = heldout.log.labels
        head = None if isinstance(labels, TopkLabels) else load_head(local_folder(folder), DTYPES[dtype], on)
        self._log = heldout.log.open(heldout.store)
        self._codec = Codec(labels, Frame(vocab_size, heldout.manifest.seq_len, head))
        self._seq_len = heldout.manifest.seq_len

    def read(self, shard: int, tokens: TokenShard) -> Answered:
        """The answers on `tokens`, the rows of `shard`; raises `IntegrityError` where they are missing or damaged."""
        record = self._log.committed(shard)
        if record is None:
            raise IntegrityError("the teacher's answers on held-out rows are not in the storage")
        groups = self._log.read(shard, record, tokens)
        try:
            targets = self._codec.targets(join([self._codec.unpack(columns) for columns in groups]), 1.0)
        except ValueError as error:
            raise IntegrityError(f"label log {self._log.key}, of held-out rows: {error}") from error
        told = [value for columns in groups for value in columns.get(TARGET_LOG_PROBS, [])]
        return Answered(targets, torch.from_numpy(unpack(told, "<f4", self._seq_len)) if told else None)
