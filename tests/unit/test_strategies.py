"""What a job file may ask for of students and strategies, what is refused at once, and what DeepSpeed is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.plan.batch import Batch
from orchestrator.plan.capacity import capacity, check_measured_here, given_rates, workload
from orchestrator.plan.cluster import assumed_calibration, parse_cluster
from orchestrator.plan.deepspeed_config import deepspeed_config
from orchestrator.plan.estimate import balanced
from orchestrator.plan.explain import explain
from orchestrator.plan.layout import Layout, layout_of
from orchestrator.plan.make import make_plan
from orchestrator.plan.schedule import learning_rate
from orchestrator.spec.load import load_job
from orchestrator.spec.train import Train

JOBS = Path(__file__).parent.parent.parent / "jobs"

REFUSED = {
    "train: {workers: 3, global_batch: 12, micro_batch: 1, parallel: {kind: pipeline, stages: 2}}": (
        "3 workers are no multiple of parallel.stages 2"
    ),
    "train: {workers: 2, parallel: {kind: pipeline, stages: 2, schedule: dualpipev}}": (
        "parallel.schedule dualpipev needs at least 4 micro-batches a step, here 2: "
        "a smaller micro_batch, a larger global_batch, or schedule 1f1b"
    ),
    "train: {workers: 2, parallel: {kind: pipeline, stages: 2, stage: 2}}": "train.parallel.stage",
    "train: {workers: 3, global_batch: 12, micro_batch: 1, parallel: {kind: expert, size: 2}}": (
        "3 workers are no multiple of parallel.size 2"
    ),
    "train: {workers: 2, parallel: {kind: expert, stage: 0}}": "train.parallel.stage",
    "train: {precision: fp8, parallel: {stage: 0}}": "precision fp8 needs parallel.stage 1 or more",
    "train: {parallel: {stage: 0, offload: cpu}, precision: fp32}": "offload cpu needs stage 1 or more",
    "train: {workers: 2, parallel: {kind: pipeline}}\nstudent: {mtp_depth: 1}": (
        "student.mtp_depth needs the embedding where the loss is; train.parallel.kind pipeline spreads them: use zero"
    ),
    "train: {workers: 2, parallel: {kind: pipeline}}\nevaluate: {every: 10}": (
        "evaluate.every: train.parallel.kind pipeline has no pass but a training step; use zero (stage 3 for large models)"
    ),
    "teacher: {train: {workers: 2, parallel: {kind: pipeline}}}\nevaluate: {every: 10}": (
        "evaluate.every: teacher.train.parallel.kind pipeline"
    ),
    "train: {keep: best}": "train.keep: best goes by evaluations during training: give evaluate.every",
    "teacher: {train: {patience: 2}}": "teacher.train.patience: 2 goes by evaluations during training: give evaluate.every",
    "train: {steps: 10, epochs: 2}": "steps 10 and epochs 2 are both given; give one of them",
    "train: {epochs: 0}": "train.epochs: must be above 0",
    "student: {kind: pruned}": "nothing is pruned: give layers, hidden_size, intermediate_size or kv_heads",
    "student: {kind: pruned, layers: 0}": "student.layers",
    "student: {kind: upcycled, path: x, experts: 2, experts_per_token: 3}": "experts_per_token 3 is above experts 2",
    "student: {kind: checkpoint}": "student.path",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_combined_is_refused_with_the_reason(tmp_path: Path, text: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"name: a\n{text}\n")
    with pytest.raises(SpecError) as caught:
        load_job(file)
    assert REFUSED[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_of_a_pipeline_share_their_rows() -> None:
    train = Train(workers=8, global_batch=32, micro_batch=2, parallel={"kind": "pipeline", "stages": 4})  # type: ignore[arg-type]
    assert Batch.of(train) == Batch(global_rows=32, ranks=2, micro_rows=2, accumulation=8)
    assert layout_of(train) == Layout(data=2, pipeline=4)
    experts = Train(workers=4, parallel={"kind": "expert", "size": 2, "stage": 2}, precision="fp8")  # type: ignore[arg-type]
    assert layout_of(experts) == Layout(data=4, expert=2, zero_stage=2, precision="fp8")


def test_what_deepspeed_is_told() -> None:
    offloaded = deepspeed_config(Train(parallel={"kind": "zero", "stage": 3, "offload": "cpu"}))  # type: ignore[arg-type]
    assert offloaded["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert (
        "offload_param"
        not in deepspeed_config(Train(parallel={"kind": "zero", "stage": 2, "offload": "cpu"}))["zero_optimization"]
    )  # type: ignore[arg-type]
    assert deepspeed_config(Train(precision="fp8"))["bf16"] == {"enabled": True}, "fp8 exists inside of products only"
    experts = deepspeed_config(Train(workers=2, parallel={"kind": "expert"}))  # type: ignore[arg-type]
    assert experts["expert_parallel"]["autoep_size"] == 2


def test_the_plan_says_aloud_that_fp8_is_emulated() -> None:
    said = "emulated, for no GPU is asked for"
    asked = ["train.precision=fp8"]
    assert said in explain(make_plan(load_job(JOBS / "quickstart.yaml", asked)))
    assert said not in explain(make_plan(load_job(JOBS / "quickstart.yaml", [*asked, "train.gpus_per_worker=1"])))
    assert said not in explain(make_plan(load_job(JOBS / "quickstart.yaml")))


def test_a_cluster_that_need_not_exist() -> None:
    plan = make_plan(load_job(JOBS / "quickstart.yaml"))
    lines = "\n".join(capacity(plan, "8xH100", 2.5, None))
    assert "on 8 H100 (1 nodes), at 40 % of the peak, which is assumed" in lines
    assert "cost" in lines
    slow, fast = ("\n".join(capacity(plan, "8xH100", None, given_rates(rates))) for rates in ((0.001, 0.001), (0.1, 0.1)))
    assert "as measured" in slow
    assert slow != fast
    with pytest.raises(SpecError, match="--tflops: 0 1, but both must be above 0"):
        given_rates((0, 1))


def test_a_plan_for_a_cluster_says_which_keys_to_set() -> None:
    plan = make_plan(load_job(JOBS / "quickstart.yaml"))
    lines = "\n".join(capacity(plan, "8xH100", None, None))
    cluster = parse_cluster("8xH100")
    assumed = assumed_calibration(cluster.device, plan.job.train.precision, plan.job.teacher.dtype)
    split = balanced(workload(plan), layout_of(plan.job.train), cluster, assumed)
    keys = re.search(r"set +(.*)", lines)
    assert keys is not None
    replicas = split.teacher_replicas
    assert f"train.workers {split.student.layout.workers}, train.global_batch 8" in keys[1]
    assert f"teacher.replicas {{min: {replicas}, max: {replicas}}}" in keys[1] and "train.gpus_per_worker 1" in keys[1]


@pytest.mark.parametrize(
    ("cluster", "on_gpu", "gpus"),
    [
        ("8xH100", False, []),
        ("8xH100", True, ["NVIDIA A100-SXM4-80GB"]),
        ("2xCPU", True, ["NVIDIA H100"]),
        ("8xL4", True, ["NVIDIA L40S"]),
    ],
)
def test_rates_measured_here_are_not_those_of_other_devices(cluster: str, on_gpu: bool, gpus: list[str]) -> None:
    """`plan --cluster 8xH100 --calibrate` on a CPU said "on 8 H100, as measured"."""
    job = load_job(JOBS / "quickstart.yaml", ["train.gpus_per_worker=1"] if on_gpu else [])
    with pytest.raises(SpecError, match=r"^--calibrate: .*--tflops"):
        check_measured_here(job, cluster, gpus)


@pytest.mark.parametrize(
    ("cluster", "gpus"), [("4xCPU", []), ("8xH100", ["NVIDIA H100 80GB HBM3"]), ("8xA100", ["NVIDIA A100-SXM4-80GB"])]
)
def test_rates_measured_here_are_those_of_such_devices(cluster: str, gpus: list[str]) -> None:
    check_measured_here(load_job(JOBS / "quickstart.yaml", ["train.gpus_per_worker=1"] if gpus else []), cluster, gpus)


def test_a_folder_says_how_large_a_teacher_is(tmp_path: Path) -> None:
    values = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    values |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings = ["data.tokenizer={kind: teacher}", f"teacher={{kind: transformers, path: {tmp_path}}}"]
    settings.append("student.model.config.vocab_size=128256")
    plan = make_plan(load_job(JOBS / "quickstart.yaml", settings))
    assert workload(plan).teacher.total == 8_030_261_248, "Llama 3.1 8B"
    with pytest.raises(SpecError, match=r"^teacher: neither the job file nor a local config.json says its size"):
        workload(make_plan(load_job(JOBS / "quickstart.yaml", [settings[0], "teacher={kind: transformers, path: a/b}"])))


def test_warmup_stable_decay() -> None:
    train = Train(steps=101, warmup_steps=1, schedule="wsd", learning_rate=1.0, final_lr_fraction=0.0)
    rates = [learning_rate(train, step) for step in range(101)]
    assert rates[:81] == [1.0] * 81
    assert rates[-1] == 0.0
    assert rates[90] == pytest.approx(10 / 99 / 0.2), "linear over the last fifth of the 99 steps after the first"


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_the_other_students_of_the_quickstart_differ_in_nothing_else(name: str) -> None:
    plain, other = load_job(JOBS / "quickstart.yaml"), load_job(JOBS / f"quickstart-{name}.yaml")
    assert other.student != plain.student
    assert other.model_copy(update={"student": plain.student, "name": plain.name}) == plain
