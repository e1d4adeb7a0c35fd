"""The labelling that the actors of a teacher pool are given, and what they report of each shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from orchestrator.spec.labels import Labels
from orchestrator.spec.model import VllmServer
from orchestrator.store.claims import Claims
from orchestrator.store.files import Store
from orchestrator.store.heldout import HeldoutLog
from orchestrator.teacher.backend import Replica

Outcome = Literal["labelled", "found", "deferred"]
"""A shard that is given to an actor is labelled and committed by it, or found committed already, or deferred because another
run has claimed it."""


class Item(NamedTuple):
    """A piece of the labelling: a token shard, or all held-out rows that the student's training is evaluated on."""

    heldout: bool
    shard: int
    """The number of the shard; 0 for held-out rows."""
    position: int
    """The place of the shard in the order in which training wants them; 0 for held-out rows."""

    @property
    def claim(self) -> str:
        """The name under which it is claimed."""
        return "heldout" if self.heldout else f"{self.shard:06d}"


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
