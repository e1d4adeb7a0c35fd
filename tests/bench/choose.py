"""Distil, train on the text alone, or retrieve? The quickstart's student each way, on the same text.

    make choose         reuses what `make quickstart` left, prints JSON and writes it to tests/bench/results/choose.json

Retrieval is a nearest-neighbour language model (Khandelwal et al. 2020): beside the student stands a store of its last hidden
states over all rows that it was trained on, and what followed the nearest of them is mixed into its prediction. The share
and the temperature of that mixture are fitted on one half of the held-out windows; every figure is measured on the other half.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from keep import keep

from orchestrator.models.build import load_model
from orchestrator.models.head import last_hidden, output_head
from orchestrator.plan.order import TrainingOrder
from orchestrator.spec.load import load_job
from orchestrator.store.heldout import measured_rows
from orchestrator.store.local import LocalStore
from orchestrator.store.records import MANIFEST, MODEL, TokenManifest
from orchestrator.store.shards import read_tokens

RUN = Path("distill-store/runs/quickstart")
NEIGHBOURS = 32
SHARES = (0.1, 0.2, 0.3, 0.4)
TEMPERATURES = (1.0, 10.0, 100.0)
QUERIES_AT_A_TIME, ROWS_AT_A_TIME = 256, 8
CPU = torch.device("cpu")


@dataclass
class Answers:
    """What one model says of held-out windows."""

    log_probs: torch.Tensor
    """[tokens]: log-probability of each target."""
    states: torch.Tensor
    """[tokens, width]: last hidden states."""
    seconds: float


@torch.inference_mode()
def main() -> None:
    store, job = LocalStore(RUN.parent.parent), load_job(RUN / "job.yaml")
    keys = {name: stage["key"] for name, stage in json.loads((RUN / "run.json").read_text())["stages"].items()}
    folder = f"data/{keys['data']}"
    manifest = TokenManifest.load(store, f"{folder}/{MANIFEST}")
    assert manifest is not None
    windows = torch.from_numpy(measured_rows(store, folder, manifest, job.evaluate.rows, 0).ids).long()
    targets = windows[:, 1:].flatten()
    fitted_on, measured_on = torch.arange(len(targets)).chunk(2)
    order = TrainingOrder(manifest.train.rows, manifest.group_rows, job.seed, job.train.global_batch, job.train.steps)
    read = sorted({row for step in range(job.train.steps) for row in order.batch(step)})
    records = {shard: manifest.train.record(store, shard) for shard in {s for s, _ in read}}
    shards = {shard: read_tokens(store, manifest.train.folder, record).ids for shard, record in records.items()}
    trained_on = torch.stack([torch.from_numpy(shards[shard][row]).long() for shard, row in read])
    result: dict[str, Any] = {"rows_trained_on": len(trained_on), "tokens_measured": len(measured_on)}
    for name in ("teacher", "student", "baseline"):
        model = load_model(store.path(f"{name}/{keys[name]}/{MODEL}"), "fp32", CPU)
        own = answers(model, windows)
        figures = {"ce_nats": -float(own.log_probs[measured_on].mean()), "tokens_per_s": len(targets) / own.seconds}
        result[name] = figures | {"bytes": 4 * sum(p.numel() for p in model.parameters())}
        if name != "teacher":
            result[f"{name} with retrieval"] = retrieval(model, own, trained_on, targets, fitted_on, measured_on, result[name])
    keep("choose", result)


def answers(model: Any, windows: torch.Tensor) -> Answers:
    """What `model` says of `windows` [rows, seq + 1]."""
    head, found, states, started = output_head(model), [], [], time.perf_counter()
    for part in windows.split(ROWS_AT_A_TIME):
        hidden = last_hidden(model, part[:, :-1]).flatten(0, 1)
        found.append(head(hidden).log_softmax(-1).gather(1, part[:, 1:].flatten()[:, None])[:, 0])
        states.append(hidden)
    return Answers(torch.cat(found), torch.cat(states), time.perf_counter() - started)


def retrieval(
    model: Any,
    own: Answers,
    trained_on: torch.Tensor,
    targets: torch.Tensor,
    fitted_on: torch.Tensor,
    measured_on: torch.Tensor,
    alone: dict[str, float],
) -> dict[str, Any]:
    """Figures of `model` beside a store of its states over `trained_on` [rows, seq + 1]."""
    keys = torch.cat([last_hidden(model, part[:, :-1]).flatten(0, 1) for part in trained_on.split(ROWS_AT_A_TIME)])
    values, squares = trained_on[:, 1:].flatten(), keys.square().sum(-1)
    started = time.perf_counter()
    distances: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    for states, target in zip(own.states.split(QUERIES_AT_A_TIME), targets.split(QUERIES_AT_A_TIME), strict=True):
        near = (squares - 2 * states @ keys.T).topk(NEIGHBOURS, largest=False)
        distances.append(near.values + states.square().sum(-1, keepdim=True))
        hits.append(values[near.indices] == target[:, None])
    seconds = time.perf_counter() - started
    distance, hit = torch.cat(distances), torch.cat(hits)

    def ce(share: float, temperature: float, part: torch.Tensor) -> float:
        found = ((-distance[part] / temperature).softmax(-1) * hit[part]).sum(-1)
        return -float((share * found + (1 - share) * own.log_probs[part].exp()).log().mean())

    share, temperature = min(itertools.product(SHARES, TEMPERATURES), key=lambda choice: ce(*choice, fitted_on))
    return {
        "ce_nats": ce(share, temperature, measured_on),
        "tokens_per_s": len(targets) / (own.seconds + seconds),
        "bytes": alone["bytes"] + 2 * keys.numel() + 4 * len(values),
        "share": share,
        "temperature": temperature,
    }


if __name__ == "__main__":
    main()
