"""The training worker: what each process of a Ray Train worker group does, from first import to last weight."""

from __future__ import annotations

import shutil
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import DTYPES
from orchestrator.plan.schedule import learning_rate
from orchestrator.runtime.board import STUDENT_SHARDS
from orchestrator.runtime.environment import limit_threads, prepare_deepspeed
from orchestrator.store.files import Store
from orchestrator.store.records import MODEL, finish_model
from orchestrator.student.checkpoint import drop_checkpoints, restore_checkpoint, save_checkpoint
from orchestrator.student.engine import forward_backward, start_engine
from orchestrator.student.feed import Feed, MicroBatch
from orchestrator.student.job import TrainingJob
from orchestrator.student.meter import Meter


def run_worker(store: Store, job: TrainingJob, board: Any, tokenizer_folder: str) -> None:
    """Train `job` to its end on this rank and leave the model in its stage folder; resumes from the newest checkpoint."""
    threads = max(1, int(job.train.cpus_per_worker))
    limit_threads(threads)
    torch.set_num_threads(threads)
    prepare_deepspeed(on_gpu=job.train.gpus_per_worker > 0)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    def reached(shards: int) -> None:
        if rank == 0:
            board.set_progress.remote(f"{job.stage}.{STUDENT_SHARDS}", shards)

    feed = Feed(store, job, rank, world, lambda: ray.get(board.aborted.remote()), reached)
    engine = start_engine(job)
    schedule = ObjectiveSchedule(job.objective, job.train.steps, engine.device)
    first = restore_checkpoint(engine, schedule, store, job.folder)
    meter = Meter(job, board, feed)
    for step, micro_batches in feed.steps(first):
        means = train_step(engine, job, schedule, step, micro_batches)
        meter.add(step, means, engine.get_global_grad_norm())
        done = step + 1
        if done % job.train.checkpoint_every == 0 and done < job.train.steps:
            meter.flush()
            save_checkpoint(engine, schedule, store, job.folder, done)
    meter.flush()
    save_model(engine, store, job, tokenizer_folder, meter.summary())


def train_step(
    engine: Any, job: TrainingJob, schedule: ObjectiveSchedule, step: int, micro_batches: list[MicroBatch]
) -> torch.Tensor:
    """One optimizer step: mean (loss, CE, divergence, features' loss) over the global batch, [4], on the device."""
    rate = learning_rate(job.train, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    mixture = schedule.at(step)
    terms: list[torch.Tensor] = []
    for micro in micro_batches:
        terms.append(forward_backward(engine, mixture, micro))
        engine.step()
    mean = torch.stack(terms).mean(0) / dist.get_world_size()
    dist.all_reduce(mean)
    schedule.learn(step, mean[2])
    return mean


def save_model(engine: Any, store: Store, job: TrainingJob, tokenizer_folder: str, training: dict[str, float]) -> None:
    """Write the Hugging Face folder of the trained model and, last, its manifest; called on every rank."""
    model: PreTrainedModel = engine.module.model
    state = _whole_state(model, job.train.parallel.stage, DTYPES[job.train.precision])
    if dist.get_rank() == 0:
        with store.folder_for(f"{job.folder}/{MODEL}") as folder:
            shutil.copytree(store.path(tokenizer_folder), folder, dirs_exist_ok=True)
            model.config.use_cache = True
            torch.nn.Module.to(model, DTYPES[job.train.precision])
            model.save_pretrained(folder, state_dict=state)
        finish_model(store, job.folder, job.vocab_size, training)
        drop_checkpoints(store, job.folder)
    dist.barrier()


def _whole_state(model: PreTrainedModel, zero_stage: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All parameters, unsharded, on the CPU of every rank that asks; under ZeRO-3 gathered one by one."""
    if zero_stage < 3:
        return {name: value.detach().to("cpu", dtype) for name, value in model.state_dict().items()}
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().to("cpu", dtype).clone()
    return state
