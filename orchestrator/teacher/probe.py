"""A few answers of a teacher behind a server, kept in the log with its first labels and compared whenever more are made.

A teacher that is loaded here is known by the content of its files, which is part of the log's key. Of a model behind a server
only a name is known, and another model may be served under that name the next day; its answers show it.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel

from orchestrator.errors import IntegrityError
from orchestrator.store.label_log import LabelLog
from orchestrator.teacher.backend import Teacher

PROBE = "probe"
"""The name under which a label log keeps its probe."""
ROWS, TOKENS = 4, 64
"""The size of the prompts: the beginnings of the first rows of a token shard."""
MOST_NATS, MOST_OTHERS = 0.05, 0.1
"""The median change of the likeliest id's log-probability, and the share of positions with another likeliest id, at which a
model is another. Rounding, in another batch or on another device, changes a bf16 model's log-probabilities by about 0.01."""


class Probe(BaseModel):
    """The likeliest id at every position of a few prompts, and its log-probability; all [rows][positions]."""

    prompts: list[list[int]]
    likeliest: list[list[int]]
    log_probs: list[list[float]]

    @classmethod
    def of(cls, teacher: Teacher, prompts: list[list[int]]) -> Probe:
        """Ask `teacher` about `prompts`, all of one length."""
        logits = torch.cat(list(teacher.answer(torch.tensor(prompts)).logits()))
        log_probs, ids = logits.float().log_softmax(-1).max(-1)
        shape = (len(prompts), -1)
        return cls(prompts=prompts, likeliest=ids.view(shape).tolist(), log_probs=log_probs.view(shape).tolist())

    def change(self, other: Probe) -> tuple[float, float]:
        """Return the median change in nats where the same id is the likeliest, and the share of positions where another is."""
        same = torch.tensor(self.likeliest) == torch.tensor(other.likeliest)
        nats = (torch.tensor(self.log_probs) - torch.tensor(other.log_probs)).abs()[same]
        return float(nats.median()) if len(nats) else 0.0, 1 - float(same.float().mean())


def check_probe(log: LabelLog, teacher: Teacher, ids: torch.Tensor, called: str) -> None:
    """Raise `IntegrityError` if `teacher` is not the one that began `log`, as far as a few answers show it.

    Without earlier answers in the log, those to the beginnings of `ids` [rows, seq] are kept. `called` is for the error.
    """
    kept = log.kept(PROBE)
    prompts = ids[:ROWS, :TOKENS].tolist() if kept is None else Probe.model_validate_json(kept).prompts
    said = Probe.of(teacher, prompts)
    if kept is None:
        log.keep(PROBE, said.model_dump_json().encode())
        kept = log.kept(PROBE)  # another replica may have been faster
    assert kept is not None
    median, others = Probe.model_validate_json(kept).change(said)
    if median >= MOST_NATS or others > MOST_OTHERS:
        raise IntegrityError(
            f"teacher.vllm: {called} is another model than the one that began {log.store.address(log.folder)}: "
            f"the likeliest id is another at {others:.0%} of the positions, elsewhere its log-probability differs by "
            f"{median:.2f} nats (median)"
        )
