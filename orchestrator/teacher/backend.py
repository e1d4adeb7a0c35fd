"""The interface of a teacher, ids in and an answer out, and the teacher that transformers computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil
import torch

from orchestrator.errors import EnvironmentFault
from orchestrator.labels.answer import Answer
from orchestrator.models.build import DTYPES, device, load_model, outline
from orchestrator.models.features import captured, feature_widths
from orchestrator.models.head import check_head, last_hidden, output_head
from orchestrator.models.sharded import ShardedHead, load_share
from orchestrator.store.files import local_folder


class Teacher(Protocol):
    def answer(self, ids: torch.Tensor) -> Answer:
        """Return the teacher's answer about `ids` [rows, seq]; position t is about ids[t + 1]."""
        ...


@dataclass(frozen=True)
class Replica:
    """The model of a teacher replica, and the processes that hold it."""

    model: str
    """The address of the model's folder."""
    dtype: Literal["bf16", "fp32"]
    features: tuple[str, ...] = ()
    """The names of the inner features that the teacher tells."""
    shards: int = 1
    cpus: float = 1
    """The CPUs of each shard, as Ray counts them."""
    gpus: float = 0
    """The GPUs of each shard."""
    patience_s: float = 60
    """Seconds without a sign of life after which a shard counts as lost."""
    call_s: float = 1800
    """Seconds after which a call into a sharded model, loading it or one pass, counts as hung."""

    @property
    def threads(self) -> int:
        """The threads of each shard."""
        return max(1, int(self.cpus))


class TransformersBackend:
    """A causal LM of transformers in this process, or the share of one that this process holds."""

    def __init__(self, replica: Replica) -> None:
        """Load the model. Where there are several shards, all processes of the default process group must do so, and call
        `answer` together from then on."""
        folder, on = local_folder(replica.model), device(replica.gpus)
        _check_room(folder, replica.dtype, on, replica.shards)
        alone = replica.shards == 1
        self.model = load_model(folder, replica.dtype, on) if alone else load_share(folder, replica.dtype, on)
        """The whole model, or this process's share of it."""
        head = output_head(self.model)
        self.head = head if alone else ShardedHead(head)
        check_head(self.model, "teacher", self.head)
        feature_widths(self.model, replica.features, "labels.features")
        self._features = replica.features

    @torch.inference_mode()
    def answer(self, ids: torch.Tensor) -> Answer:
        with captured(self.model, self._features, "labels.features") as found:
            hidden = last_hidden(self.model, ids.to(self.model.device))
        return Answer(hidden, self.head, self.head.vocab_size, found)

    def empty(self, shape: torch.Size) -> torch.Tensor:
        """Return an uninitialized tensor for hidden states of this teacher."""
        return torch.empty(shape, dtype=self.model.dtype, device=self.model.device)


def _check_room(folder: Path, dtype: str, on: torch.device, shards: int) -> None:
    """Raise `EnvironmentFault` if this process's share of the weights does not fit into the free memory of its device."""
    need = sum(weight.numel() for weight in outline(folder).parameters()) * DTYPES[dtype].itemsize // shards
    free = torch.cuda.mem_get_info()[0] if on.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise EnvironmentFault(
            f"teacher.shards: each of {shards} holds {need / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB are free; use more"
        )
