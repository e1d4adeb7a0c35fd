"""The labelling that the actors of a teacher pool are given, and what they report of each shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from orchestrator.spec.labels import Labels
from orchestrator.spec.model import VllmServer
from orchestrator.store.claims import Claims
from orchestrator.store.files import Store
from orchestrator.store.heldout import AnswerLog, HeldoutLog
from orchestrator.store.label_log import LabelLog
from orchestrator.teacher.backend import Replica

Outcome = Literal["labelled", "found", "deferred", "failed"]
"""A shard that is given to an actor is labelled and committed by it, or found committed already, or deferred because another
run has claimed it. Answers that only the report needs may fail."""
Kind = Literal["shard", "watched", "measured", "continuations"]
"""A token shard; the held-out rows that the student's training is evaluated on; a shard of those that models are measured on;
the prompts of the report, which are continued."""


class Item(NamedTuple):
    """A piece of the labelling."""

    kind: Kind
    shard: int = 0
    """The number of the shard in its log."""
    position: int = 0
    """The place of a token shard in the order in which training wants them."""

    @property
    def claim(self) -> str:
        """The name under which it is claimed."""
        return f"{self.shard:06d}" if self.kind == "shard" else f"{self.kind}-{self.shard:06d}"

    @property
    def optional(self) -> bool:
        """Return whether only the report needs the item."""
        return self.kind in ("measured", "continuations")


@dataclass(frozen=True)
class Answering:
    """The answers that are still missing on the held-out rows that models are measured on."""

    log: AnswerLog
    shards: tuple[int, ...]
    speed_rows: int
    """Rows in a pass by which speed is measured."""
    continues: bool
    """True if prompts are to be continued too; only a process that holds a whole teacher can do that."""


@dataclass(frozen=True)
class LabelTask:
    """Everything that an actor of the pool needs to know, the same for all of them.

    It is small, because Ray keeps it for restarts.
    """

    store: Store
    data_folder: str
    """The folder of the tokens in the storage."""
    replica: Replica
    vocab_size: int
    labels: Labels
    log_key: str
    micro_batch: int
    """The rows of one forward pass."""
    board: Any
    """The handle of the run's board."""
    claims: Claims
    vllm: VllmServer | None = None
    """The server that answers in place of `replica`, if there is one."""
    heldout: HeldoutLog | None = None
    """The held-out rows that are to be labelled before all shards."""
    answering: Answering | None = None
    """The held-out rows that are to be answered, for evaluation, before all shards."""

    def log_of(self, item: Item) -> LabelLog:
        """Return the log that the labels of `item` go to."""
        match item.kind:
            case "watched":
                assert self.heldout is not None
                return LabelLog(self.store, self.heldout.key)
            case "measured" | "continuations":
                assert self.answering is not None
                return self.answering.log.open(self.store)
            case _:
                return LabelLog(self.store, self.log_key)
