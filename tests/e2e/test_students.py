"""Every kind of student and every parallel strategy as a user runs them: a job file, `distill run`, a folder at the end.

The jobs share one storage, so that the teacher and most labels are made once, and one Ray.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import Json, model, report, started, tiny_job, write_corpus, write_job

pytestmark = pytest.mark.timeout(1800)

TWO = {"workers": 2, "cpus_per_worker": 0.5}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK = {
    "type": "deepseek_v3",
    "config": model(2)["config"] | LATENT | ROUTED | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
}


def jobs(folder: Path) -> dict[str, Json]:
    """By name; `train` holds what differs from a short plain training."""
    plain = tiny_job(write_corpus(folder / "corpus"), folder / "store")
    export = str(folder / "store" / "runs" / "cut" / "export")
    students: dict[str, tuple[Json, Json]] = {
        "cut": ({"kind": "config", "model": model(2)}, TWO | {"parallel": {"kind": "pipeline", "stages": 2}}),
        "latent": ({"kind": "config", "mtp_depth": 1, "model": DEEPSEEK}, {"activation_checkpointing": True}),
        "pruned": ({"kind": "pruned", "layers": 1, "intermediate_size": 32, "calibration_rows": 4}, {}),
        "continued": ({"kind": "checkpoint", "path": export}, TWO | {"parallel": {"kind": "zero", "stage": 3}}),
        "upcycled": (
            {"kind": "upcycled", "path": export, "experts": 4},
            TWO | {"parallel": {"kind": "expert", "size": 2}},
        ),
        "eight": ({"kind": "config", "model": model(3)}, {"precision": "fp8"}),
        "unlike": ({"kind": "upcycled", "path": str(folder / "nothing")}, {}),
        "shallow": (
            {"kind": "config", "model": model(2)},
            TWO | {"micro_batch": 1, "parallel": {"kind": "pipeline", "stages": 2, "schedule": "dualpipev"}},
        ),
        "thin": ({"kind": "config", "model": model(2)}, {"precision": "fp8", "parallel": {"kind": "zero", "stage": 1}}),
        "wide": ({"kind": "pruned", "hidden_size": 64}, {}),
        "dense": ({"kind": "config", "model": model(2)}, TWO | {"parallel": {"kind": "expert", "size": 2}}),
    }
    train = plain["train"] | {"steps": 8, "warmup_steps": 2, "micro_batch": 2}
    return {
        name: plain | {"name": name, "student": student, "train": train | changed}
        for name, (student, changed) in students.items()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """By name of the job: exit code, stderr, the storage's root."""
    folder = tmp_path_factory.mktemp("students")
    made = jobs(folder)
    files = [write_job(job) for job in made.values()]
    with started(folder / "log", "-m", "tests.several", *files) as several:
        ended = several.wait().assert_ok()
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return {name: line | {"storage": folder / "store"} for name, line in zip(made, lines, strict=True)}


def figures(outcomes: dict[str, Json], name: str) -> Any:
    assert outcomes[name]["code"] == 0, outcomes[name]["stderr"][-4000:]
    return report(outcomes[name]["storage"], name)["student"]


@pytest.mark.parametrize("name", ["cut", "latent", "pruned", "continued", "upcycled", "eight"])
def test_the_student_is_there_and_is_what_was_measured(outcomes: dict[str, Json], name: str) -> None:
    from transformers import AutoModelForCausalLM

    found = figures(outcomes, name)
    folder = outcomes[name]["storage"] / "runs" / name / "export"
    student, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert sum(p.numel() for p in student.parameters()) == found["params"]
    mixture = name in ("latent", "upcycled")
    assert (found["active_params"] < found["params"]) == mixture
    assert student.dtype == (torch.bfloat16 if name == "eight" else torch.float32)
    assert found["heldout_ce_nats"] < 6.3, "ln 512 is 6.24"


def test_what_has_learnt_before_is_ahead_of_what_starts_from_nothing(outcomes: dict[str, Json]) -> None:
    fresh, continued = figures(outcomes, "cut"), figures(outcomes, "continued")
    assert continued["heldout_ce_nats"] < fresh["heldout_ce_nats"]
    assert figures(outcomes, "upcycled")["heldout_ce_nats"] < fresh["heldout_ce_nats"]


def test_multi_token_prediction_is_measured_and_exported(outcomes: dict[str, Json]) -> None:
    found = figures(outcomes, "latent")
    assert found["mtp_tokens_per_forward"] == pytest.approx(1 + found["mtp_acceptance_1"])
    assert (outcomes["latent"]["storage"] / "runs" / "latent" / "export" / "mtp" / "weights.safetensors").is_file()
    assert "mtp_acceptance_1" not in figures(outcomes, "cut")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("unlike", 2, "student.path: {root}/nothing is not a directory"),
        ("dense", 2, "train.parallel.kind: 'expert' cannot train models of type 'llama', only deepseek_v3, mixtral"),
        ("shallow", 2, "train.parallel.stages: dualpipev over 2 stages cuts the model in 4, but it has 2 layers"),
        ("thin", 2, "train.precision: fp8 leaves the first and the last block in bf16, and the model has 2 in all"),
        ("wide", 2, "student.hidden_size: 64 asked for, but LlamaForCausalLM has 32"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(outcomes: dict[str, Json], name: str, code: int, message: str) -> None:
    found = outcomes[name]
    assert found["code"] == code
    assert message.format(root=found["storage"].parent) in found["stderr"].splitlines()[-1]
