"""The training worker: what each process of a Ray Train worker group does, from first import to last weight."""

from __future__ import annotations

import hashlib
from functools import partial
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
from orchestrator.student.best import Selection
from orchestrator.student.checkpoint import drop_checkpoints, restore_checkpoint, save_checkpoint
from orchestrator.student.feed import Feed, MicroBatch
from orchestrator.student.gate import Gate
from orchestrator.student.heldout import Evaluator
from orchestrator.student.job import TrainingJob
from orchestrator.student.meter import Meter, peak_memory_bytes
from orchestrator.student.nonfinite import Skips
from orchestrator.student.step import StepResult
from orchestrator.student.trainer import Trainer, start_trainer
from orchestrator.tracking.names import HELDOUT_CE_NATS


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

    def aborted() -> str | None:
        return ray.get(board.aborted.remote())

    trainer = start_trainer(job)
    engine = trainer.engine
    feed = Feed(store, job, trainer.data_rank, aborted, reached, trainer.reads_labels)
    schedule = ObjectiveSchedule(job.objective, job.steps, engine.device)
    evaluator = Evaluator(trainer, store, job, aborted)
    selection = Selection(store, job) if job.selects else None
    done = saved = restore_checkpoint(engine, schedule, store, job.folder, board.warn.remote, selection)
    if done and first_rank:
        board.say.remote(f"{job.stage}: goes on from step {done} of {job.steps}")
    skips = Skips(store, job, board, trainer.data_rank)
    meter = Meter(job, board, feed)

    def save() -> int:
        nonlocal saved
        if done > saved:
            meter.flush()
            save_checkpoint(engine, schedule, store, job.folder, done, selection)
            meter.saved()
            saved = done
        return done

    for step, micro_batches in Gate(board).through(feed.steps(done), save):
        result = train_step(trainer, job, schedule, step, micro_batches)
        if not result.applied:
            skips.take(step, result.means, result.losses)
        routing = trainer.balance.after_step(engine.device, result.applied) if trainer.balance else None
        done, heldout = step + 1, dict[str, float]()
        if evaluator.due(done):
            with meter.aside(engine.device):
                heldout = evaluator.evaluate()
                if selection:
                    selection.take(done, heldout[HELDOUT_CE_NATS], partial(write_model, trainer, store, job, tokenizer_folder))
                    if first_rank:
                        selection.prune()
        meter.add(step, result, engine.get_global_grad_norm(), routing, heldout)
        if selection and selection.exhausted:
            break
        if done % job.train.checkpoint_every == 0 and done < job.steps:
            save()
    meter.flush()
    reached(len(job.demanded_shards()))  # a teacher that waits for a student that has stopped early labels the rest
    training = meter.summary() | {"peak_memory_bytes": peak_memory_bytes(engine.device), "skipped_steps": skips.count}
    save_model(trainer, store, job, tokenizer_folder, training, selection)


def train_step(
    trainer: Trainer, job: TrainingJob, schedule: ObjectiveSchedule, step: int, micro_batches: list[MicroBatch]
) -> StepResult:
    """Do optimizer step number `step` over the global batch; a step that is not applied teaches the schedule nothing."""
    torch.manual_seed(step_seed(job.seed, trainer.data_rank, step))
    rate = learning_rate(job.train, step)
    for group in trainer.engine.optimizer.param_groups:
        group["lr"] = rate
    result = trainer.step(schedule.at(step), micro_batches)
    if result.applied:
        schedule.learn(step, result.means[2])
    return result


def step_seed(seed: int, rank: int, step: int) -> int:
    """The seed of everything that a step draws, such as dropout.

    Data-parallel ranks draw differently, and a step that is done again draws the same.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:8])


def save_model(
    trainer: Trainer,
    store: Store,
    job: TrainingJob,
    tokenizer_folder: str,
    training: dict[str, float],
    selection: Selection | None = None,
) -> None:
    """Leave the trained model, or the one that `selection` has kept, as the stage's; called on every rank."""
    if job.train.keep == "last":
        write_model(trainer, store, job, tokenizer_folder, job.folder, training)
    if dist.get_rank() == 0:
        if selection and job.train.keep == "best":
            finish_model(store, job.folder, job.vocab_size, training | selection.finish())
        drop_checkpoints(store, job.folder)
        store.remove(f"{job.folder}/best")
    dist.barrier()


def write_model(
    trainer: Trainer, store: Store, job: TrainingJob, tokenizer_folder: str, folder: str, figures: dict[str, float]
) -> None:
    """Write the Hugging Face folder of the model as it is into the stage folder `folder` and, last, its manifest.

    Called on every rank.
    """
    dtype = DTYPES[job.train.precision]
    state = trainer.whole_state(trainer.model, dtype)
    ahead = trainer.whole_state(trainer.mtp, dtype) if trainer.mtp else None
    if dist.get_rank() == 0:
        with store.folder_for(f"{folder}/{MODEL}") as target:
            trainer.model.config.dtype = dtype
            trainer.model.save_pretrained(target, state_dict=state)
            complete_folder(target, store.local(tokenizer_folder), job.manifest.seq_len)
            if ahead is not None:
                save_mtp(ahead, job.ahead.depth, target)
        finish_model(store, folder, job.vocab_size, figures)
    dist.barrier()
