"""Every architecture: three steps cut over two ranks, saved, and read again by transformers, as if one process had done it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from orchestrator.models.build import build_model
from orchestrator.spec.model import Model
from orchestrator.spec.train import Train
from orchestrator.student.job import TrainingJob
from tests.contracts.test_stages import MODELS as PLAIN
from tests.contracts.test_stages import VOCAB
from tests.parity.course import MICRO, ROWS, SEED, Bench, Case, build_bench, course, detour, run_steps
from tests.parity.ranks import run_on_ranks

STEPS = 3
LATE = PLAIN["deepseek-v3"].config | {"first_k_dense_replace": 3}
MODELS = PLAIN | {"deepseek-v3-late": Model(type="deepseek_v3", config=LATE)}
"""Cut in two, the last has all its experts in the second half."""
ALONE = {"kind": "zero"}
CUT = {"kind": "pipeline", "stages": 2}
LOGITS = 2e-5
"""How far those of the saved model may be from those of the one process, as a share of the largest."""


def job_of(bench: Bench, name: str, parallel: dict[str, Any], workers: int) -> TrainingJob:
    train = Train(
        steps=STEPS,
        global_batch=ROWS,
        micro_batch=MICRO,
        warmup_steps=1,
        precision="fp32",
        parallel=parallel,  # type: ignore[arg-type]
        workers=workers,
    )
    plain = bench.job(Case("hard", 1), workers)
    return replace(plain, stage=f"{name}-{workers}", model=MODELS[name], vocab_size=VOCAB, train=train)


def train_all(bench: Bench, parallel: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Losses by architecture; every model is saved."""
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import save_model

    losses = {}
    for name in MODELS:
        job = job_of(bench, name, parallel, dist.get_world_size())
        trainer = start_trainer(job)

        def balanced(_done: int, trainer: Any = trainer) -> bool:
            if trainer.balance is not None:
                trainer.balance.after_step(trainer.engine.device)
            return True

        losses[name] = run_steps(bench, job, trainer, course(job), 0, balanced)
        save_model(trainer, bench.store, job, "data/x/tokenizer", {})
        trainer.engine.destroy()
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Any, Any]:
    print(f"weights and order from seed {SEED}")
    root = tmp_path_factory.mktemp("architectures")
    bench = build_bench(root, VOCAB)
    return bench, run_on_ranks(1, root, train_all, bench, ALONE), run_on_ranks(2, root, train_all, bench, CUT)


def saved(bench: Bench, name: str, parallel: dict[str, Any], workers: int) -> Any:
    """As transformers loads it, which must find everything it looks for and nothing else."""
    folder: Path = bench.store.path(f"{job_of(bench, name, parallel, workers).folder}/model")
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_cut_in_two_it_learns_and_is_saved_like_in_one_piece(trained: tuple[Bench, Any, Any], name: str) -> None:
    bench, alone, cut = trained
    one, two = saved(bench, name, ALONE, 1), saved(bench, name, CUT, 2)
    fresh = build_model(MODELS[name], VOCAB, SEED, "student")
    ids = torch.arange(24).reshape(2, 12) % VOCAB
    with torch.no_grad():
        expected, found, before = (model(input_ids=ids).logits for model in (one, two, fresh.eval()))
    off = float((found - expected).abs().max() / expected.abs().max())
    weights = detour(two.state_dict(), {n: w.double() for n, w in one.state_dict().items()}, fresh.state_dict())
    print(f"logits off by {off:.1e}, weights by {weights:.1e}")
    assert off < LOGITS
    assert float((before - expected).abs().max() / expected.abs().max()) > 100 * LOGITS, "three steps changed something"
    for mine, theirs in zip(cut[name], alone[name], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    biases = [n for n in one.state_dict() if n.endswith("e_score_correction_bias")]
    assert bool(biases) == name.startswith("deepseek-v3")
    for bias in biases:
        assert one.state_dict()[bias].abs().max() > 0, "balanced without a loss"
        assert torch.equal(one.state_dict()[bias], two.state_dict()[bias])
