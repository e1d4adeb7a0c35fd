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

from orchestrator.labels.targets import Columns, SparseTargets, column, finite, id_width, pack_ids, unpack_ids
from orchestrator.spec.distill import SampledLabels

BLOCK = 32
"""Ids per block of the two-level inverse CDF; measured best on CPU between 16 and 256 for 4k to 262k ids."""
ENTRIES_PER_CHUNK = 1 << 22
"""Logits worked on at a time, to bound the memory of the fp32 copies."""


class Sampled:
    def __init__(self, spec: SampledLabels, vocab_size: int) -> None:
        self._spec = spec
        self._width = id_width(vocab_size)

    def encode(self, logits: torch.Tensor, seeds: list[bytes]) -> Columns:
        """Columns `n` (unique ids per position), `ids` and `counts` for every temperature. `logits`: [rows, seq, vocab]."""
        finite(logits)
        columns: Columns = {}
        for temperature in self._spec.temperatures:
            names = [column(name, temperature) for name in ("n", "ids", "counts")]
            for name in names:
                columns[name] = []
            points = np.stack([self._points(seed, temperature, logits.shape[1]) for seed in seeds])
            for drawn in self._draw(logits, points, temperature):
                for name, value in zip(names, self._pack(drawn), strict=True):
                    columns[name].append(value)
        return columns

    def decode(self, columns: Columns, temperature: float) -> SparseTargets:
        """Targets [rows, seq, most unique ids]; t = counts / N."""
        unique = np.stack([np.frombuffer(b, dtype=np.uint8) for b in columns[column("n", temperature)]])
        places = np.arange(int(unique.max())) < unique[..., None]
        ids = np.zeros(places.shape, dtype=np.int64)
        probs = np.zeros(places.shape, dtype=np.float32)
        ids[places] = unpack_ids(columns[column("ids", temperature)], self._width)
        counts = np.frombuffer(b"".join(columns[column("counts", temperature)]), dtype=np.uint8)
        probs[places] = counts.astype(np.float32) / np.float32(self._spec.samples)
        return SparseTargets(torch.from_numpy(ids), torch.from_numpy(probs), tail=None)

    def _draw(self, logits: torch.Tensor, points: np.ndarray, temperature: float) -> np.ndarray:
        """Ids [rows, seq, samples] for `points` of the same shape."""
        step = max(1, ENTRIES_PER_CHUNK // logits.shape[-1])
        flat = torch.from_numpy(points.reshape(-1, points.shape[-1])).to(logits.device)
        parts = zip(logits.flatten(0, 1).split(step), flat.split(step), strict=True)
        drawn = torch.cat([draw(part if temperature == 1 else part.float() / temperature, u) for part, u in parts])
        return drawn.view(points.shape).cpu().numpy()

    def _points(self, seed: bytes, temperature: float, seq: int) -> np.ndarray:
        """Points in [0, 1) at which to invert the CDF, ascending: [seq, samples], float64."""
        n = self._spec.samples
        draws = seq if self._spec.method == "systematic" else seq * n
        uniform = _uniforms(seed + f"{temperature:g}".encode(), draws)
        if self._spec.method == "systematic":
            return (np.arange(n) + uniform[:, None]) / n
        return np.sort(uniform.reshape(seq, n), axis=1)

    def _pack(self, drawn: np.ndarray) -> tuple[bytes, bytes, bytes]:
        """`drawn` [seq, samples], ascending in each position, as unique counts, ids and multiplicities."""
        new = np.ones(drawn.shape, dtype=bool)
        new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        starts = np.flatnonzero(new)
        counts = np.diff(np.append(starts, drawn.size))
        return (
            new.sum(1).astype(np.uint8).tobytes(),
            pack_ids(drawn.reshape(-1)[starts], self._width),
            counts.astype(np.uint8).tobytes(),
        )


def draw(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Ids at which the CDF of softmax(`logits` [n, vocab]) passes `points` [n, k] (float64, in [0, 1)): [n, k].

    Two levels: the masses of blocks of ids accumulate in float64 over the vocabulary, then the ids inside each block
    that was hit. A point is scaled by the mass it is compared with, so the weights need no normalising and rounding can
    push no draw to an id without mass.
    """
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
    inner = weights[torch.arange(n, device=logits.device)[:, None], block].cumsum(-1, dtype=torch.float64)
    within = _below(share * inner[..., -1], inner[..., -1])
    return block * BLOCK + torch.searchsorted(inner, within[..., None], right=True).squeeze(-1)


def _below(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`value`, kept under `limit` where rounding has carried it there."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _uniforms(seed: bytes, count: int) -> np.ndarray:
    """`count` float64 in [0, 1) with 53 random bits each, from SHAKE-256 of `seed`: the same on every platform."""
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), dtype="<u8")
    return (words >> np.uint64(11)) * 2.0**-53
