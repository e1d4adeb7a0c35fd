"""Sampled soft labels: N draws from the teacher's distribution at the loss temperature, kept as ids with counts.

t_i = c_i / N has E[t] = p, so the gradient p_student - t is unbiased at any vocabulary size (random sampling
knowledge distillation, Anshumann et al. 2025). Never renormalised over the drawn ids.

Systematic draws: one uniform U per position, u_j = (j + U) / N, id_j = the inverse CDF at u_j. Counts are then
floor(N p) or ceil(N p): the same expectation with less variance than independent draws. U comes from the hash of the
log's key and the row, so a shard labelled twice is labelled alike.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

import hashlib

import numpy as np
import torch

from orchestrator.errors import SpecError
from orchestrator.labels.answer import Answer
from orchestrator.labels.layout import Arrays, Frame, tempered
from orchestrator.labels.packing import SampledPacking
from orchestrator.labels.targets import Sparse
from orchestrator.spec.labels import SampledLabels

BLOCK = 32
"""Ids per block of the two-level inverse CDF; measured best on CPU between 16 and 256 for 4k to 262k ids."""
CACHED_ENTRIES = 1 << 18
"""Logits that a CPU draws from at a time: 1 MiB in fp32, so that its passes over them stay in its cache."""


class Sampled(SampledPacking):
    def __init__(self, spec: SampledLabels, frame: Frame) -> None:
        if spec.samples > frame.vocab_size:
            raise SpecError(f"labels.samples: {spec.samples} exceeds the vocabulary of {frame.vocab_size}")
        super().__init__(spec, frame.shape)
        self._spec = spec

    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """For every temperature `ids` [rows, seq, samples], ascending in each position, repeats included."""
        rows, seq, _ = answer.states.shape
        points = {t: np.concatenate([self._points(seed, t, seq) for seed in seeds]) for t in self._spec.temperatures}
        drawn: dict[float, list[np.ndarray]] = {t: [] for t in points}
        done = 0
        for logits in answer.logits():
            part = slice(done, done + len(logits))
            for t, u in points.items():
                at_temperature = logits if t == 1 else logits / t
                drawn[t].append(draw(at_temperature, torch.from_numpy(u[part]).to(logits.device)).cpu().numpy())
            done += len(logits)
        return {tempered("ids", t): np.concatenate(parts).reshape(rows, seq, -1) for t, parts in drawn.items()}

    def targets(self, arrays: Arrays, temperature: float) -> Sparse:
        """Targets [rows, seq, most unique ids]; t = counts / N."""
        drawn = torch.from_numpy(arrays[tempered("ids", temperature)]).long()
        new = torch.ones_like(drawn, dtype=torch.bool)
        new[..., 1:] = drawn[..., 1:] != drawn[..., :-1]
        place = new.cumsum(-1) - 1
        ids = torch.zeros_like(drawn).scatter_(-1, place, drawn)
        counts = torch.zeros(drawn.shape).scatter_add_(-1, place, torch.ones(drawn.shape))
        most = int(place.max()) + 1
        return Sparse(ids[..., :most], counts[..., :most] / self._spec.samples, tail=None)

    def _points(self, seed: bytes, temperature: float, seq: int) -> np.ndarray:
        """Points in [0, 1) at which to invert the CDF, ascending: [seq, samples], float64."""
        n = self._spec.samples
        draws = seq if self._spec.method == "systematic" else seq * n
        uniform = _uniforms(seed + f"{temperature:g}".encode(), draws)
        if self._spec.method == "systematic":
            return (np.arange(n) + uniform[:, None]) / n
        return np.sort(uniform.reshape(seq, n), axis=1)


def draw(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Ids at which the CDF of softmax(`logits` [n, vocab]) passes `points` [n, k] (float64, in [0, 1)): [n, k].

    Two levels: the masses of blocks of ids accumulate in float64 over the vocabulary, then the ids inside each block
    that was hit. A point is scaled by the mass it is compared with, so the weights need no normalising and rounding can
    push no draw to an id without mass.
    """
    rows = len(logits) if logits.is_cuda else max(1, CACHED_ENTRIES // logits.shape[1])
    return torch.cat([_draw(*part) for part in zip(logits.split(rows), points.split(rows), strict=True)])


def _draw(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    n, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    weights = (logits.float() - logits.amax(-1, keepdim=True).float()).exp_()
    if blocks * BLOCK != vocab:
        weights = torch.nn.functional.pad(weights, (0, blocks * BLOCK - vocab))
    weights = weights.view(n, blocks, BLOCK)
    mass = weights.sum(-1)
    upper = mass.cumsum(-1, dtype=torch.float64)
    target = _below(points * upper[:, -1:], upper[:, -1:])
    block = torch.searchsorted(upper, target, right=True)
    share = (1 + (target - upper.gather(1, block)) / mass.gather(1, block)).clamp_min(0)
    hit = (block + blocks * torch.arange(n, device=logits.device)[:, None]).flatten()
    inner = weights.view(-1, BLOCK).index_select(0, hit).view(*block.shape, BLOCK).cumsum(-1, dtype=torch.float64)
    within = _below(share * inner[..., -1], inner[..., -1])
    return block * BLOCK + torch.searchsorted(inner, within[..., None], right=True).squeeze(-1)


def _below(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`value`, kept under `limit` where rounding has carried it there."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _uniforms(seed: bytes, count: int) -> np.ndarray:
    """`count` float64 in [0, 1) with 53 random bits each, from SHAKE-256 of `seed`: the same on every platform."""
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
    return (words >> np.uint64(11)) * 2.0**-53
