"""The training worker: what each process of a Ray Train worker group does, from first import to last weight."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
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
from orchestrator.models.writing import ModelWriter
from orchestrator.plan.schedule import learning_rate
from orchestrator.runtime.board import STUDENT_SHARDS
from orchestrator.runtime.environment import limit_threads, prepare_deepspeed
from orchestrator.store.files import StillOurs, Store, unguarded
from orchestrator.store.records import MANIFEST, MODEL, finish_model
from orchestrator.student.best import Selection
from orchestrator.student.checkpoint import CheckpointWriter, drop_checkpoints, restore_checkpoint
from orchestrator.student.feed import Feed, MicroBatch
from orchestrator.student.gate import Gate
from orchestrator.student.heldout import Evaluator
from orchestrator.student.job import TrainingJob
from orchestrator.student.meter import Meter, peak_memory_bytes
from orchestrator.student.nonfinite import Skips
from orchestrator.student.ranks import await_key
from orchestrator.student.step import StepResult
from orchestrator.student.trainer import Trainer, start_trainer
from orchestrator.tracking.names import HELDOUT_CE_NATS


def run_worker(store: Store, job: TrainingJob, board: Any, tokenizer_folder: str, still_ours: StillOurs) -> None:
    """Train `job` to its end on this rank and leave the model in its stage folder; resumes from the newest checkpoint.

    `still_ours` tells whether the lock that the driver holds for this training is held still; it is asked before anything is
    published.
    """
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
    done = begun = restore_checkpoint(engine, schedule, store, job.folder, board.warn.remote, selection)
    if done and first_rank:
        board.say.remote(f"{job.stage}: goes on from step {done} of {job.steps}")
    checkpoints = CheckpointWriter(engine, schedule, store, job.folder, selection, still_ours)
    skips = Skips(store, job, board, trainer.data_rank)
    meter = Meter(job, board, feed)

    def save() -> int:
        """Return the step at which this training would go on, once its checkpoint is durable."""
        nonlocal begun
        meter.flush()
        if done > begun:
            checkpoints.save_now(done)
            begun = done
        else:
            checkpoints.finish()
            dist.barrier()  # the end of one rank ends them all, and the first may still be publishing
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
                    write = partial(write_model, trainer, store, job, tokenizer_folder, still_ours=still_ours)
                    selection.take(done, heldout[HELDOUT_CE_NATS], write)
                    if first_rank:
                        selection.prune()
        meter.add(step, result, engine.get_global_grad_norm(), routing, heldout)
        if selection and selection.exhausted:
            break
        if saved := checkpoints.settled():
            meter.saved(saved.at_s, saved.stalled_s)
        if done % job.train.checkpoint_every == 0 and done < job.steps:
            meter.flush()
            checkpoints.start(done)
            begun = done
    checkpoints.finish()
    meter.flush()
    reached(len(job.demanded_shards()))  # a teacher that waits for a student that has stopped early labels the rest
    training = meter.summary() | {"peak_memory_bytes": peak_memory_bytes(engine.device), "skipped_steps": skips.count}
    save_model(trainer, store, job, tokenizer_folder, training, selection, still_ours)


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
    still_ours: StillOurs = unguarded,
) -> None:
    """Leave the trained model, or the one that `selection` has kept, as the stage's; called on every rank.

    Raises what `still_ours` does, which is asked before anything is published.
    """
    if job.train.keep == "last":
        write_model(trainer, store, job, tokenizer_folder, job.folder, training, still_ours)
    if dist.get_rank() == 0:
        still_ours()
        if selection and job.train.keep == "best":
            finish_model(store, job.folder, job.vocab_size, training | selection.finish())
        drop_checkpoints(store, job.folder)
        store.remove(f"{job.folder}/best")


def write_model(
    trainer: Trainer,
    store: Store,
    job: TrainingJob,
    tokenizer_folder: str,
    folder: str,
    figures: dict[str, float],
    still_ours: StillOurs = unguarded,
) -> None:
    """Write the Hugging Face folder of the model as it is into the stage folder `folder` and, last, its manifest.

    Called on every rank. Rank 0 holds one file of it at a time. Raises what `still_ours` does, which is asked before anything
    is published.
    """
    dtype, first = DTYPES[job.train.precision], dist.get_rank() == 0
    with store.folder_for(f"{folder}/{MODEL}", still_ours) if first else nullcontext() as target:
        writer = ModelWriter(trainer.model, target, dtype) if target else None
        for name, tensor in trainer.tensors(trainer.model, dtype):
            assert writer is not None
            writer.add(name, tensor)
        ahead = dict(trainer.tensors(trainer.mtp, dtype)) if trainer.mtp else None
        if writer and target:
            writer.finish()
            complete_folder(target, store.local(tokenizer_folder), job.manifest.seq_len)
            if ahead is not None:
                save_mtp(ahead, job.ahead.depth, target)
    if first:
        still_ours()
        finish_model(store, folder, job.vocab_size, figures)
    await_key(store, f"{folder}/{MANIFEST}")  # no barrier: to upload a large model takes longer than one waits
