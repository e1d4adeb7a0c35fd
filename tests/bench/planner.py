"""The plan's figures beside measured ones: peak memory of a training worker, and tokens per second, over ten small jobs.

    make bench-planner     prints one JSON line last and writes it to tests/bench/results/planner.json

Every training runs in a process of its own, as rank 0 of 1, without Ray: the trainer of a job, synthetic tokens and draws,
one thread. Rates are those that `distill plan --calibrate` measures for the job, in another process, on models of one and
three blocks with labels of a small teacher; nothing that is predicted was used for its own prediction, but the constants of
`plan/footprint.py` were chosen on trainings like these.
Memory is the peak of the resident set since the process began. Time is the process's CPU time: the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

from fresh import fresh
from keep import keep, machine

from orchestrator.plan.cluster import DEVICES, Calibration, Cluster
from orchestrator.plan.footprint import Rows, footprint
from orchestrator.plan.layout import Layout, layout_of
from orchestrator.plan.make import student_model
from orchestrator.plan.sizes import Decoder, decoder
from orchestrator.plan.speed import training_speed
from orchestrator.runtime.environment import limit_threads, lone_process, prepare_deepspeed
from orchestrator.spec.job import Job

STEPS = 7
TARGETS = {"peak_memory": 0.15, "tokens_per_s": 0.20}
Case = dict[str, Any]


def case(kind: str, size: str, batch: str, precision: str, stage: int, **config: Any) -> Case:
    """`size` is width, inner width, blocks, heads, key-value heads; `batch` vocabulary, sequence, micro-batch, accumulation."""
    width, ffn, layers, heads, kv_heads = map(int, size.split())
    vocab, seq, micro, accumulation = map(int, batch.split())
    shape = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes = {"vocab": vocab, "seq": seq, "micro": micro, "accumulation": accumulation}
    return {"type": kind, "config": shape | config, "precision": precision, "stage": stage, **sizes}


MLA = {"q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
EXPERTS = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
CASES = [
    case("llama", "384 1024 6 6 6", "8192 256 8 1", "bf16", 1),
    case("llama", "512 1536 8 8 4", "32000 256 4 1", "bf16", 2),
    case("llama", "512 1536 4 8 4", "16384 512 2 2", "bf16", 3),
    case("llama", "384 1024 6 6 6", "8192 256 4 2", "fp32", 1),
    case("qwen3", "512 1536 6 8 4", "16384 128 8 1", "fp32", 2, head_dim=64),
    case("gemma3_text", "384 1536 6 4 2", "32768 256 4 1", "bf16", 1, head_dim=96),
    case("mistral", "640 1792 4 10 5", "8192 128 4 1", "fp32", 3),
    case("mixtral", "384 768 4 6 2", "8192 256 4 1", "bf16", 1, num_local_experts=8),
    case("qwen3_moe", "384 768 4 6 2", "8192 256 2 1", "fp32", 1, num_local_experts=16, **EXPERTS),
    case("deepseek_v3", "384 1024 4 6 6", "16384 256 4 1", "bf16", 2, n_routed_experts=8, n_group=1, topk_group=1,
         first_k_dense_replace=1, **EXPERTS, **MLA),
]  # fmt: skip


def job_of(training: Case) -> Job:
    """The job file of a case, with a small teacher."""
    rows = training["micro"] * training["accumulation"]
    parallel = {"kind": "zero", "stage": training["stage"]}
    batch = {"global_batch": rows, "micro_batch": training["micro"]}
    return Job.model_validate(
        {
            "name": training["type"].replace("_", "-"),
            "data": {"seq_len": training["seq"], "tokenizer": {"kind": "train", "vocab_size": training["vocab"]}},
            "student": {"kind": "config", "model": {"type": training["type"], "config": training["config"]}},
            "objective": {"alpha": 0.3},
            "train": {"steps": STEPS, "warmup_steps": 1, "precision": training["precision"], "parallel": parallel, **batch},
        }
    )


def measure(training: Case) -> dict[str, Any]:
    """Train a few steps in this process; peak bytes, and CPU-seconds of a step."""
    lone_process()
    limit_threads(1)
    prepare_deepspeed(on_gpu=False)
    import torch
    import torch.distributed as dist
    from memory import peak

    from orchestrator.calibration import step_time

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        found = step_time(training_job(training), draws(training), time.process_time)
        return {"peak": peak(), "cpu_s": found.whole}


def rates(training: Case) -> dict[str, Any]:
    """What the planner would measure for this job, in this process."""
    limit_threads(1)
    from orchestrator.calibration import calibrated

    return vars(calibrated(job_of(training), time.process_time))


def training_job(training: Case) -> Any:
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import Soft, TrainingJob

    job = job_of(training)
    soft = Soft("", job.labels, job.objective, "/nowhere", "bf16")
    manifest = TokenManifest.without_corpus(training["seq"], training["vocab"])
    return TrainingJob("student", student_model(job), training["vocab"], job.train, 0, "", manifest, soft)


def draws(training: Case) -> list[Any]:
    """Micro-batches of random tokens with fifty random draws each."""
    import torch
    from labels import merged

    from orchestrator.student.feed import MicroBatch

    rows, seq, vocab = training["micro"], training["seq"], training["vocab"]
    micro_batches = []
    for _ in range(training["accumulation"]):
        drawn = torch.randint(vocab, (rows * seq, 50)).sort(-1).values
        soft = merged(drawn, vocab).map(lambda t: t.unflatten(0, (rows, seq)))
        micro_batches.append(MicroBatch(torch.randint(vocab, (rows, seq + 1)), soft, {}))
    return micro_batches


def described(training: Case) -> tuple[Decoder, Layout, Rows]:
    model = decoder(training["type"], training["config"], training["vocab"])
    assert model is not None
    return model, layout_of(job_of(training).train), Rows(training["micro"], training["accumulation"], training["seq"])


def compared(training: Case, found: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    model, layout, rows = described(training)
    predicted = footprint(model, layout, rows, on_gpu=False)
    speed = training_speed(model, layout, rows, Cluster(DEVICES["CPU"], 1, 1), calibration)
    tokens_per_s = rows.tokens / found["cpu_s"]
    return {
        **training,
        "parameters": model.total,
        "predicted_mb": round(predicted.total / 2**20),
        "measured_mb": round(found["peak"] / 2**20),
        "memory_error": round(predicted.total / found["peak"] - 1, 3),
        "predicted_tokens_per_cpu_s": round(speed.tokens_per_s),
        "measured_tokens_per_cpu_s": round(tokens_per_s),
        "tokens_error": round(speed.tokens_per_s / tokens_per_s - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure or args.rates:
        print(json.dumps(measure(args.measure) if args.measure else rates(args.rates)))
        return
    loads = [os.getloadavg()[0]]
    rows = []
    for training in CASES:
        calibration = Calibration(**fresh(__file__, "--rates", training))
        rows.append(compared(training, fresh(__file__, "--measure", training), calibration))
        loads.append(os.getloadavg()[0])
        print(json.dumps(rows[-1]), flush=True)
    errors = {name: [abs(row[f"{name}_error"]) for row in rows] for name in ("memory", "tokens")}
    result = {
        "machine": machine(),
        "load": round(max(loads), 2),
        "targets": TARGETS,
        "memory_within_target": sum(e <= TARGETS["peak_memory"] for e in errors["memory"]),
        "tokens_within_target": sum(e <= TARGETS["tokens_per_s"] for e in errors["tokens"]),
        "worst": {name: max(values) for name, values in errors.items()},
        "cases": rows,
    }
    keep("planner", result)


if __name__ == "__main__":
    main()
