"""The training worker: what each process of a Ray Train worker group does, from first import to last weight."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import DTYPES
from orchestrator.models.generation import complete_folder
from orchestrator.models.mtp import save_mtp
from orchestrator.plan.schedule import learning_rate
from orchestrator.runtime.board import STUDENT_SHARDS
from orchestrator.runtime.environment import limit_threads, prepare_deepspeed
from orchestrator.store.files import Store
from orchestrator.store.records import MODEL, finish_model
from orchestrator.student.checkpoint import drop_checkpoints, restore_checkpoint, save_checkpoint
from orchestrator.student.feed import Feed, MicroBatch
from orchestrator.student.job import TrainingJob
from orchestrator.student.meter import Meter, peak_memory_bytes
from orchestrator.student.trainer import Trainer, start_trainer


def run_worker(store: Store, job: TrainingJob, board: Any, tokenizer_folder: str) -> None:
    """Train `job` to its end on this rank and leave the model in its stage folder; resumes from the newest checkpoint."""
    threads = max(1, int(job.train.cpus_per_worker))
    limit_threads(threads)
    torch.set_num_threads(threads)
    prepare_deepspeed(on_gpu=job.train.gpus_per_worker > 0)
    first_rank = ray.train.get_context().get_world_rank() == 0

    def reached(shards: int) -> None:
        if first_rank:
            board.set_progress.remote(f"{job.stage}.{STUDENT_SHARDS}", shards)

    trainer = start_trainer(job)
    engine = trainer.engine
    feed = Feed(store, job, trainer.data_rank, lambda: ray.get(board.aborted.remote()), reached, trainer.reads_labels)
    schedule = ObjectiveSchedule(job.objective, job.train.steps, engine.device)
    first = restore_checkpoint(engine, schedule, store, job.folder, board.warn.remote)
    meter = Meter(job, board, feed)
    for step, micro_batches in feed.steps(first):
        means = train_step(trainer, job, schedule, step, micro_batches)
        routing = trainer.balance.after_step(engine.device) if trainer.balance else None
        meter.add(step, means, engine.get_global_grad_norm(), routing)
        done = step + 1
        if done % job.train.checkpoint_every == 0 and done < job.train.steps:
            meter.flush()
            save_checkpoint(engine, schedule, store, job.folder, done)
            meter.saved()
    meter.flush()
    save_model(trainer, store, job, tokenizer_folder, meter.summary())


def train_step(
    trainer: Trainer, job: TrainingJob, schedule: ObjectiveSchedule, step: int, micro_batches: list[MicroBatch]
) -> torch.Tensor:
    """Optimizer step number `step`: means of `TERMS` over the global batch, [5]."""
    rate = learning_rate(job.train, step)
    for group in trainer.engine.optimizer.param_groups:
        group["lr"] = rate
    means = trainer.step(schedule.at(step), micro_batches)
    schedule.learn(step, means[2])
    return means


def save_model(trainer: Trainer, store: Store, job: TrainingJob, tokenizer_folder: str, training: dict[str, float]) -> None:
    """Write the Hugging Face folder of the trained model and, last, its manifest; called on every rank."""
    dtype = DTYPES[job.train.precision]
    state = trainer.whole_state(trainer.model, dtype)
    ahead = trainer.whole_state(trainer.mtp, dtype) if trainer.mtp else None
    if dist.get_rank() == 0:
        with store.folder_for(f"{job.folder}/{MODEL}") as folder:
            trainer.model.config.dtype = dtype
            trainer.model.save_pretrained(folder, state_dict=state)
            complete_folder(folder, store.local(tokenizer_folder), job.manifest.seq_len)
            if ahead is not None:
                save_mtp(ahead, job.ahead.depth, folder)
        finish_model(
            store, job.folder, job.vocab_size, training | {"peak_memory_bytes": peak_memory_bytes(trainer.engine.device)}
        )
        drop_checkpoints(store, job.folder)
    dist.barrier()
