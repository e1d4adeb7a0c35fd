"""The plan's figures beside measured ones: peak memory of a training worker, and tokens per second, over ten small trainings.

    make bench-planner     prints one JSON line last and writes it to tests/bench/results/planner.json

Every training runs in a process of its own, as rank 0 of 1, without Ray: the trainer of a job, synthetic tokens and draws,
one thread. Rates come from two other, short trainings per precision, one wide and one narrow, from which the two unknown
rates (FLOPs, and bytes of activations) are solved for; the optimizer's rate is that of the wide one. Nothing that is
predicted was used for its own prediction, but the constants of `plan/footprint.py` were chosen on trainings like these.
Memory is the peak of the resident set since the process began. Time is the process's CPU time; wall time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.plan.cluster import DEVICES, Calibration, Cluster
from orchestrator.plan.footprint import Rows, activation_bytes_per_token, footprint
from orchestrator.plan.layout import Layout
from orchestrator.plan.sizes import Decoder, decoder
from orchestrator.plan.speed import training_flops, training_speed

HERE = Path(__file__).parent
STEPS, WARM = 5, 2
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
CALIBRATIONS = {
    precision: [
        case("llama", "768 2048 3 12 12", "4096 256 4 1", precision, 1),
        case("llama", "192 512 8 6 6", "24576 128 16 1", precision, 1),
    ]
    for precision in ("fp32", "bf16")
}


def measure(training: Case) -> dict[str, Any]:
    """Train a few steps in this process; peak bytes, and seconds of a step with the optimizer's part of it."""
    from orchestrator.runtime.environment import limit_threads, prepare_deepspeed

    limit_threads(1)
    prepare_deepspeed(on_gpu=False)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    import torch
    import torch.distributed as dist
    from memory import peak

    from orchestrator.losses.schedule import ObjectiveSchedule
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import train_step

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        job = training_job(training)
        trainer = start_trainer(job)
        schedule = ObjectiveSchedule(job.objective, STEPS, torch.device("cpu"))
        updates = timed(trainer.engine)
        seconds, wall, update = [], [], []
        for step in range(STEPS):
            micro_batches = draws(training)
            before = len(updates)
            started, began = time.process_time(), time.perf_counter()
            train_step(trainer, job, schedule, step, micro_batches)
            seconds.append(time.process_time() - started)
            wall.append(time.perf_counter() - began)
            update.append(sum(updates[before:]))
        medians = [statistics.median(values[WARM:]) for values in (seconds, wall, update)]
        return {"peak": peak(), **dict(zip(("cpu_s", "wall_s", "update_s"), medians, strict=True))}


def training_job(training: Case) -> Any:
    from orchestrator.spec.labels import SampledLabels
    from orchestrator.spec.model import Model
    from orchestrator.spec.objective import Objective
    from orchestrator.spec.train import Train
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import Soft, TrainingJob

    rows = training["micro"] * training["accumulation"]
    train = Train.model_validate(
        {
            "steps": STEPS,
            "warmup_steps": 1,
            "global_batch": rows,
            "micro_batch": training["micro"],
            "precision": training["precision"],
            "parallel": {"kind": "zero", "stage": training["stage"]},
        }
    )
    soft = Soft("", SampledLabels(), Objective(alpha=0.3), "/nowhere", "bf16")
    model = Model(type=training["type"], config=training["config"])
    counts = {"documents": 0, "heldout_documents": 0, "skipped_documents": 0, "dropped_tokens": 0}
    manifest = TokenManifest(
        fingerprint="",
        seq_len=training["seq"],
        vocab_size=training["vocab"],
        tokenizer_sha256="",
        train=(),
        heldout=(),
        **counts,
    )
    return TrainingJob("student", model, training["vocab"], train, 0, "", manifest, soft)


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


def timed(engine: Any) -> list[float]:
    """CPU-seconds of each call of the engine's step, as they are made."""
    seconds: list[float] = []
    step = engine.step

    def measured() -> None:
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)

    engine.step = measured
    return seconds


def described(training: Case) -> tuple[Decoder, Layout, Rows]:
    model = decoder(training["type"], training["config"], training["vocab"])
    assert model is not None
    layout = Layout(zero_stage=training["stage"], precision=training["precision"])
    return model, layout, Rows(training["micro"], training["accumulation"], training["seq"])


def calibrated(shapes: list[Case], found: list[dict[str, Any]]) -> Calibration:
    """Rates under which the passes of both shapes take as long as they did: x flops + y bytes = seconds per token."""
    (f1, b1, s1), (f2, b2, s2) = (_costs(shape, times) for shape, times in zip(shapes, found, strict=True))
    x, y = (s1 * b2 - s2 * b1) / (f1 * b2 - f2 * b1), (f1 * s2 - f2 * s1) / (f1 * b2 - f2 * b1)
    model = described(shapes[0])[0]
    update = 12 * model.total / found[0]["update_s"]
    if min(x, y) <= 0:  # one of them does not count beside the noise
        x, y = max(x, 0) or 1e-15, max(y, 0) or 1e-15
    return Calibration(1 / x, 1 / x, 1 / y, update)


def _costs(shape: Case, times: dict[str, Any]) -> tuple[float, float, float]:
    """FLOPs, bytes and seconds of the passes, per token."""
    model, layout, rows = described(shape)
    passes = (times["cpu_s"] - times["update_s"]) / rows.tokens
    touched = activation_bytes_per_token(model, layout, rows.seq_len, on_gpu=False)
    return training_flops(model, rows.seq_len), touched, passes


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
        "measured_tokens_per_s": round(rows.tokens / found["wall_s"]),
        "tokens_error": round(speed.tokens_per_s / tokens_per_s - 1, 3),
    }


def fresh(training: Case) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, __file__, "--worker", json.dumps(training)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{training}: exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "planner.json")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return
    loads = [os.getloadavg()[0]]
    rates = {precision: calibrated(shapes, [fresh(s) for s in shapes]) for precision, shapes in CALIBRATIONS.items()}
    rows = []
    for training in CASES:
        rows.append(compared(training, fresh(training), rates[training["precision"]]))
        loads.append(os.getloadavg()[0])
        print(json.dumps(rows[-1]), flush=True)
    errors = {name: [abs(row[f"{name}_error"]) for row in rows] for name in ("memory", "tokens")}
    result = {
        "machine": platform.processor() or platform.machine(),
        "load": round(max(loads), 2),
        "rates": {precision: vars(c) for precision, c in rates.items()},
        "targets": TARGETS,
        "memory_within_target": sum(e <= TARGETS["peak_memory"] for e in errors["memory"]),
        "tokens_within_target": sum(e <= TARGETS["tokens_per_s"] for e in errors["tokens"]),
        "worst": {name: max(values) for name, values in errors.items()},
        "cases": rows,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
