"""What a teacher is to the rest: ids in, an answer out."""

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
        """What it says about `ids` [rows, seq]: position t is about ids[t + 1]."""
        ...


@dataclass(frozen=True)
class Replica:
    """What a replica of a teacher consists of."""

    model: str
    """Address of its folder."""
    dtype: Literal["bf16", "fp32"]
    features: tuple[str, ...] = ()
    """Names of what is taken from inner layers."""
    shards: int = 1
    cpus: float = 1
    """Of each shard, as Ray counts; and so are GPUs."""
    gpus: float = 0
    patience_s: float = 60
    """A shard that shows no sign of life for so long is lost."""
    call_s: float = 1800
    """Loading, or one pass, that takes a sharded replica longer than this hangs."""

    @property
    def threads(self) -> int:
        """Of each shard."""
        return max(1, int(self.cpus))


class TransformersBackend:
    """A causal LM of transformers in this process, or this process's share of one."""

    def __init__(self, replica: Replica) -> None:
        """Of several shards, every process of the default process group must make one, and call it together from then on."""
        folder, on = local_folder(replica.model), device(replica.gpus)
        _check_room(folder, replica.dtype, on, replica.shards)
        alone = replica.shards == 1
        self._model = load_model(folder, replica.dtype, on) if alone else load_share(folder, replica.dtype, on)
        head = output_head(self._model)
        self.head = head if alone else ShardedHead(head)
        check_head(self._model, "teacher", self.head)
        feature_widths(self._model, replica.features, "labels.features")
        self._features = replica.features

    @torch.inference_mode()
    def answer(self, ids: torch.Tensor) -> Answer:
        with captured(self._model, self._features, "labels.features") as found:
            hidden = last_hidden(self._model, ids.to(self._model.device))
        return Answer(hidden, self.head, self.head.vocab_size, found)

    def empty(self, shape: torch.Size) -> torch.Tensor:
        """Room for hidden states of this teacher."""
        return torch.empty(shape, dtype=self._model.dtype, device=self._model.device)


def _check_room(folder: Path, dtype: str, on: torch.device, shards: int) -> None:
    """Raise `EnvironmentFault` if this process's share of the weights is more than there is memory where it works."""
    need = sum(weight.numel() for weight in outline(folder).parameters()) * DTYPES[dtype].itemsize // shards
    free = torch.cuda.mem_get_info()[0] if on.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise EnvironmentFault(
            f"teacher.shards: each of {shards} holds {need / 1e9:.1f} GB of weights, but {free / 1e9:.1f} GB are free; use more"
        )
