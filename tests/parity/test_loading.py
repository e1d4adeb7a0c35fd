"""Ranks that make a share of a model each start with the weights of the whole, whatever they hold of it in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.models.build import build_model
from orchestrator.models.mtp import MultiTokenPrediction
from orchestrator.student.job import Ahead, Initial
from tests.parity.course import MODELS, SEED, VOCAB, Bench, Case, build_bench
from tests.parity.ranks import run_on_ranks

CASES = {
    "zero": [
        *(Case("hard", 3, precision, model=model) for precision in ("fp32", "bf16") for model in ("tied", "untied", "experts")),
        Case("hard", 0, model="untied"),
        Case("hard", 1, "bf16"),
        Case("hard", 2, "bf16", model="experts"),
    ],
    "expert": [Case("hard", 1, precision, strategy="ep2", model="experts") for precision in ("fp32", "bf16")],
    "pipeline": [
        Case("hard", 1, strategy=strategy, model=model)
        for strategy, model in (
            ("1f1b", "deep"),
            ("1f1b", "deep-untied"),
            ("1f1b", "experts"),
            ("dualpipev", "deep"),
            ("dualpipev", "deep-untied"),
        )
    ],
}
OTHER_SEED = SEED + 1
"""Of the weights in the folders."""
STARTS = {"seed": SEED, "folder": OTHER_SEED}


def starts(bench: Bench, root: Path, kind: str) -> dict[str, Any]:
    """By case and start: from which seed the weights of the trainer are, and how many parameters each rank has of them."""
    from orchestrator.student.trainer import start_trainer

    found = {}
    for case in CASES[kind]:
        for start in STARTS:
            job = replace(bench.job(case, dist.get_world_size()), ahead=Ahead(int(kind == "zero"), 0.3))
            if start == "folder":
                job = replace(job, model=Initial(folder=str(root / case.model), content=""))
            trainer = start_trainer(job)
            states = [dict(trainer.tensors(part, torch.float32)) for part in (trainer.model, trainer.mtp) if part is not None]
            held = [p.numel() for p in trainer.model.parameters() if not p.is_meta]
            counts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(counts, sum(held))
            if dist.get_rank() == 0:
                same = [seed for seed in STARTS.values() if is_of_seed(case, seed, states)]
                found[f"{case.name} {start}"] = {"seeds": same, "held": counts}
            trainer.engine.destroy()
    return found


def is_of_seed(case: Case, seed: int, states: list[dict[str, torch.Tensor]]) -> bool:
    """Whether the state of the model is what one process draws from `seed`, and that of what is beside it of `SEED`."""
    model: Any = build_model(MODELS[case.model], VOCAB, seed, "student")
    whole = [named_once(model)]
    if len(states) == 2:
        whole.append(named_once(MultiTokenPrediction(model, 1, SEED)))
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name].to(dtype).float()) for name in mine)
        for mine, theirs in zip(states, whole, strict=True)
    )


def named_once(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of `module`, tied parameters under their first names only."""
    state, parameters = module.state_dict(), dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    return {name: value for name, value in state.items() if name in parameters or name in buffers}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    root = tmp_path_factory.mktemp("loading")
    bench = build_bench(root)
    for name in {case.model for cases in CASES.values() for case in cases}:
        build_model(MODELS[name], VOCAB, OTHER_SEED, "student").save_pretrained(root / name, save_original_format=False)
    return cache(lambda kind: run_on_ranks(2, root, starts, bench, root, kind))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=lambda case: case.name)
def test_ranks_start_with_the_weights_of_the_whole(started: Any, case: Case, start: str) -> None:
    found = started(case.kind)[f"{case.name} {start}"]
    assert found["seeds"] == [STARTS[start]]
    if case.kind == "pipeline":
        whole: Any = build_model(MODELS[case.model], VOCAB, SEED, "student")
        twice = case.model == "deep" and case.strategy == "1f1b"  # the first and the last rank hold the tied embedding
        assert sum(found["held"]) == whole.num_parameters() + twice * whole.lm_head.weight.numel()
        assert max(found["held"]) < whole.num_parameters()
