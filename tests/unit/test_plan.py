"""The plan: figures that can be checked against what is later built, and no heavy import on the way to them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model
from orchestrator.plan.batch import Batch
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.plan.explain import as_dict, explain
from orchestrator.plan.fingerprint import canonical, fingerprint
from orchestrator.plan.make import Plan, make_plan
from orchestrator.plan.memory import label_bytes_per_token
from orchestrator.plan.schedule import learning_rate
from orchestrator.plan.sizes import DENSE_DECODERS, decoder
from orchestrator.spec.base import result_fields
from orchestrator.spec.job import Job
from orchestrator.spec.labels import DenseLabels, HiddenLabels, SampledLabels, TopkLabels
from orchestrator.spec.load import load_job
from orchestrator.spec.model import Model, PretrainTeacher
from orchestrator.spec.train import Train, Zero

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
HEAVY = ("torch", "ray", "transformers", "deepspeed", "mlflow", "datasets", "tokenizers")


# The batch algebra.


@given(st.integers(1, 16), st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_batch_algebra(workers: int, micro: int, accumulation: int, asked: int) -> None:
    train = Train(workers=workers, global_batch=workers * micro * accumulation, micro_batch=micro)
    assert Batch.of(train) == Batch(workers * micro * accumulation, workers, micro, accumulation)
    try:
        batch = Batch.of(Train(workers=workers, global_batch=workers * micro * accumulation, micro_batch=asked))
    except ValidationError:
        assert (micro * accumulation) % min(asked, micro * accumulation)
    else:
        assert batch.ranks * batch.micro_rows * batch.accumulation == batch.global_rows
        assert batch.micro_rows <= asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_batch": 10, "workers": 4}, "global_batch 10 does not divide among 4 workers"),
        ({"global_batch": 12, "workers": 2, "micro_batch": 4}, "6 rows per worker do not divide into micro_batch 4"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps 6 exceeds steps 5"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Train(**fields)


# The learning rate.


def rates(**fields: Any) -> list[float]:
    train = Train(learning_rate=0.5, **fields)
    return [learning_rate(train, step) for step in range(train.steps)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(steps=20, warmup_steps=4, schedule=schedule)[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
        assert rates(steps=20, warmup_steps=0, schedule=schedule)[0] == 0.5


def test_schedules_end_where_they_should() -> None:
    assert set(rates(steps=20, warmup_steps=4, schedule="constant")[3:]) == {0.5}
    linear = rates(steps=20, warmup_steps=3, schedule="linear", final_lr_fraction=0.2)[3:]
    assert linear == pytest.approx([0.5 - 0.4 * i / 16 for i in range(17)])
    cosine = rates(steps=20, warmup_steps=3, schedule="cosine", final_lr_fraction=0.2)[3:]
    assert cosine == pytest.approx([0.1 + 0.2 * (1 + math.cos(math.pi * i / 16)) for i in range(17)])
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == 0.5
    assert cosine[-1] == pytest.approx(0.1)


@given(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 1))
def test_rates_stay_between_zero_and_the_peak(steps: int, warmup: int, schedule: str, final: float) -> None:
    values = rates(steps=steps, warmup_steps=min(warmup, steps), schedule=schedule, final_lr_fraction=final)
    assert all(0 <= value <= 0.5 + 1e-12 for value in values)


# DeepSpeed.


def test_bf16_without_zero_is_refused() -> None:
    """DeepSpeed would accumulate gradients in bf16, and take one step of AdamW on zero gradients before the first."""
    with pytest.raises(ValidationError, match=r"bf16.*stage"):
        Train(precision="bf16", parallel=Zero(stage=0))


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), *((p, s) for p in ("fp32", "bf16") for s in (1, 2, 3))])
def test_deepspeed_config(precision: Any, stage: Any) -> None:
    train = Train(
        global_batch=24,
        workers=2,
        micro_batch=4,
        learning_rate=3e-4,
        betas=(0.8, 0.99),
        weight_decay=0.05,
        grad_clip=0.7,
        precision=precision,
        parallel=Zero(stage=stage),
    )
    config = deepspeed_config(train)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        24,
        4,
        3,
    )
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"] == {"stage": stage}
    optimizer = config["optimizer"]
    assert optimizer["type"] == "AdamW"
    assert optimizer["params"] == {"lr": 3e-4, "betas": [0.8, 0.99], "weight_decay": 0.05, "torch_adam": True, "fused": True}
    assert ("bf16" in config) == (precision == "bf16")
    assert "fp16" not in config
    if precision == "bf16":
        assert config["bf16"] == {"enabled": True}
        assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert json.loads(json.dumps(config)) == config


# Sizes.

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "grouped queries": {"num_key_value_heads": 2},
    "one group, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "own head size": {"num_key_value_heads": 2, "head_dim": 16},
    "heads written as null": {"num_key_value_heads": None},
    "biases": {"attention_bias": True},
    "biases in the feed-forward part": {"mlp_bias": True},
}
NOT_FOR = {
    "own head size": ("qwen2",),
    "heads written as null": ("mistral", "gemma3_text"),
    "biases": ("mistral", "qwen2"),
    "biases in the feed-forward part": ("mistral", "qwen2", "qwen3", "gemma3_text"),
}
"""Where transformers does not take the variant."""


@pytest.mark.parametrize(("kind", "variant"), [(k, v) for k in DENSE_DECODERS for v in VARIANTS if k not in NOT_FOR.get(v, ())])
def test_the_parameter_count_is_that_of_the_model_built(kind: str, variant: str) -> None:
    model = Model(type=kind, config=SHAPE | VARIANTS[variant])
    counted = decoder(kind, model.config, 101)
    assert counted is not None
    assert counted.total == sum(p.numel() for p in build_model(model, 101, 0, "student").parameters())


@pytest.mark.parametrize("model", [Model(type="gpt2", config=SHAPE), Model(config={**SHAPE, "hidden_size": "32"})])
def test_an_unknown_count_is_said_to_be_unknown(model: Model) -> None:
    assert decoder(model.type, model.config, 101) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(type="lama", config=SHAPE), "student.model.type: transformers knows no 'lama'"),
        (Model(config=SHAPE | {"hiden_size": 3}), "student.model.config.hiden_size: not a configuration value of 'llama'"),
        (
            Model(config=SHAPE | {"vocab_size": 7}),
            "student.model.config.vocab_size: 7, but the teacher's vocabulary has 101 ids",
        ),
        (Model(config=SHAPE | {"hidden_size": "32"}), "student.model.config"),
        (Model(config=SHAPE | {"num_attention_heads": 5}), "student.model.config"),
        (Model(type="mistral", config=SHAPE | {"num_key_value_heads": None}), "student.model.config"),
    ],
    ids=range(6),
)
def test_a_model_that_transformers_refuses_is_the_fault_of_the_job_file(model: Model, message: str) -> None:
    from orchestrator.models.build import model_config

    with pytest.raises(SpecError, match=re.escape(message)):
        model_config(model, 101, "student")


@pytest.mark.parametrize("vocab", [300, 70_000])
@pytest.mark.parametrize(
    "labels",
    [
        SampledLabels(temperatures=(1.0, 2.0)),
        TopkLabels(kind="topk", k=20, temperatures=(1.0, 2.0)),
        DenseLabels(kind="dense"),
        HiddenLabels(kind="hidden", codec="int8"),
    ],
)
def test_label_bytes_are_an_upper_bound(vocab: int, labels: Any) -> None:
    import torch

    from orchestrator.labels.answer import Answer
    from orchestrator.labels.kinds import label_kind
    from orchestrator.labels.layout import Frame

    logits = torch.randn(1, 5, vocab, generator=torch.Generator().manual_seed(3)) / 10  # nearly as many ids as there can be
    kind = label_kind(labels, Frame(vocab, 5))
    columns = kind.pack(kind.extract(Answer.of_logits(logits), [b"seed"]))
    size = sum(len(blob) for name, blobs in columns.items() for blob in blobs if not name.startswith(("table", "sizes")))
    assert size <= label_bytes_per_token(labels, vocab, vocab) * 5 <= 2.5 * size, "but for what a whole shard shares"


# Fingerprints.


def test_a_fingerprint_takes_in_everything() -> None:
    base = fingerprint("data", {"a": 1, "b": [1, 2]}, "x")
    others = [
        fingerprint("labels", {"a": 1, "b": [1, 2]}, "x"),
        fingerprint("data", {"a": 1.5, "b": [1, 2]}, "x"),
        fingerprint("data", {"a": 1, "b": [2, 1]}, "x"),
        fingerprint("data", {"a": 1, "b": [1, 2]}),
        fingerprint("data", {"a": 1, "b": [1, 2]}, "x", None),
        fingerprint("data", {"a": "1", "b": [1, 2]}, "x"),
        fingerprint("data", {"a": 1, "b": [1, 2], "c": None}, "x"),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert fingerprint("data", {"b": (1, 2), "a": 1}, "x") == base, "order of keys and kind of sequence do not matter"
    assert len(base) == 32
    assert fingerprint("train", Train(steps=17)) == fingerprint("train", result_fields(Train(steps=17)))
    for unfit in (math.nan, math.inf, {1, 2}, b"bytes", object()):
        with pytest.raises((TypeError, ValueError)):
            canonical(unfit)


# Whole plans.


def plan_of(**fields: Any) -> Plan:
    return make_plan(Job(name="x", **fields))


def test_there_are_jobs() -> None:
    assert ROOT / "jobs" / "quickstart.yaml" in JOBS
    assert len((ROOT / "jobs" / "quickstart.yaml").read_text().splitlines()) < 40


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_every_job_loads_and_plans(file: Path) -> None:
    plan = make_plan(load_job(file))
    names = [stage.name for stage in plan.stages]
    assert [n for n in names if n not in ("data", "teacher", "baseline")] == [
        "labels",
        "student",
        "evaluate",
        "export",
        "report",
    ]
    assert {"data", "teacher"} == set(names[:2])
    assert json.loads(json.dumps(as_dict(plan)))["job"]["name"] == plan.job.name
    words = explain(plan)
    assert plan.job.name in words
    assert all(stage.name in words for stage in plan.stages)


def test_figures_of_a_plan() -> None:
    train = Train(steps=17, global_batch=12, workers=3, micro_batch=2)
    plan = plan_of(train=train)
    assert plan.run_directory.endswith("/runs/x")
    assert plan.label_rows == 204
    assert plan.label_bytes_at_most == int(
        204 * 256 * label_bytes_per_token(plan.job.labels, plan.job.data.tokenizer.vocab_size, 0)
    )
    assert plan.student.batch == Batch(12, 3, 2, 2)
    assert plan.student.deepspeed == deepspeed_config(train)
    assert plan.teacher is not None
    student, teacher = plan.job.student.model, plan.job.teacher
    assert isinstance(teacher, PretrainTeacher)
    assert plan.student.params == sum(p.numel() for p in build_model(student, 4096, 0, "student").parameters())
    assert plan.teacher.params == sum(p.numel() for p in build_model(teacher.model, 4096, 0, "teacher").parameters())


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        ({}, 0),
        ({"train": Train(steps=20, gpus_per_worker=1)}, 1),
        ({"teacher": PretrainTeacher(gpus_per_shard=1)}, 1),
        ({"teacher": PretrainTeacher(train=Train(steps=20, gpus_per_worker=1))}, 1),
    ],
)
def test_models_are_measured_on_a_gpu_where_anything_is_computed_on_one(fields: Any, gpus: int) -> None:
    (evaluate,) = (stage for stage in plan_of(**fields).stages if stage.name == "evaluate")
    assert (evaluate.cpus, evaluate.gpus) == (1, gpus)


def test_a_plan_without_a_known_vocabulary() -> None:
    teacher: Any = {"kind": "transformers", "path": "/models/x"}
    plan = plan_of(data={"tokenizer": {"kind": "teacher"}}, teacher=teacher)
    assert plan.student.params is None
    assert plan.student.memory is None
    assert plan.teacher is None
    assert "not known before the run" in explain(plan)
    assert [stage.name for stage in plan.stages][:2] == ["teacher", "data"]


def test_a_local_ray_gets_the_slots_that_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    teacher = PretrainTeacher(cpus_per_shard=0.5, train=Train(workers=2))
    assert plan_of(teacher=teacher, train=Train(workers=4)).cpu_slots == 5
    assert plan_of(teacher=PretrainTeacher(train=Train(workers=8))).cpu_slots == 8
    assert plan_of(teacher=PretrainTeacher(shards=4), train=Train(workers=2)).cpu_slots == 6
    assert plan_of(cluster={"num_cpus": 3}).cpu_slots == 3
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert plan_of().cpu_slots == 64


# Imports.

LOADED = f"""
import sys
code = 0
{{what}}
print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
CLI = """
from orchestrator.cli import main
sys.argv = ["distill", {arguments}]
try:
    main()
except SystemExit as ending:
    code = ending.code or 0
"""


def loaded(what: str) -> list[str]:
    """The heavy packages that `what` has imported, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(what=what)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize(
    "arguments",
    ["'plan', 'jobs/quickstart.yaml'", "'run', 'jobs/quickstart.yaml', '--dry-run'", "'schema'", "'--help'"],
    ids=["plan", "dry run", "schema", "help"],
)
def test_commands_that_only_plan_import_nothing_heavy(arguments: str) -> None:
    assert loaded(CLI.format(arguments=arguments)) == []


def test_spec_plan_and_store_import_nothing_heavy() -> None:
    modules = [file for part in ("spec", "plan", "store") for file in (ROOT / "orchestrator" / part).glob("*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in modules]
    assert len(names) > 15
    assert loaded(f"import {', '.join(names)}") == []
    assert loaded("import orchestrator.labels.topk") == ["torch"], "an import would be noticed"
