"""DualPipeV beside 1F1B on 2 and on 4 processes: step time and idle share as measured, as simulated, and by the plan's formula.

    make bench-pipelines     prints one JSON line last and writes it to tests/bench/results/pipelines.json

Both schedules train the same model on the same random rows in the same processes (gloo, one thread each), in rounds by turns,
by the trainer of a job. Their losses must be those of plain data parallel on one process. Two models: eight equal blocks, which
DeepSpeed cuts unevenly because it counts norm and head as one more, and fifteen blocks with a head that costs about as much.

    idle_measured          1 - CPU time / wall time of the steps, mean over the ranks. It counts waiting for a core as idle
    idle_measured_fastest  the same of the fastest step, the one that other work on the machine disturbed least
    queued_for_core        what of idle_measured was waiting for a core (Linux schedstat); the rest is mostly for messages
    idle_simulated         DeepSpeed's own instruction lists, played with a core for every rank, transfers without duration, and
                           the CPU times of the pieces of the model, measured alone in one process
    idle_simulated_even    the same with pieces that all take the mean time, which is what the formula assumes
    idle_formula           `plan.layout.bubble`

The optimizer's step is in what was measured, and not in what was simulated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from keep import keep, machine

from orchestrator.plan.layout import Layout, bubble

HERE = Path(__file__).parent
SEQ, MICRO_ROWS, SEED = 128, 1, 0
MODELS = {"8 blocks": (8, 256, 512), "15 blocks + head": (15, 192, 3072)}
"""Blocks, width and vocabulary."""
MICRO_BATCHES = {2: (4, 8), 4: (8, 16)}
"""By processes."""
SCHEDULES = ("1f1b", "dualpipev")
ROUNDS = 8
"""Of one step with each schedule."""
CHECKED_STEPS = 3
"""Steps whose losses are compared with those on one process."""
TOLERANCE = 1e-5
"""Of a loss, relative; one step of training must move it by ten times as much."""
REPEATS = 24

Seconds = tuple[float, float]
"""Of a forward and a backward pass of one micro-batch."""


def training_job(name: str, micro_batches: int, ranks: int, parallel: dict[str, Any]) -> Any:
    """On hard labels alone."""
    from orchestrator.spec.model import Model
    from orchestrator.spec.train import Train
    from orchestrator.store.records import TokenManifest
    from orchestrator.student.job import TrainingJob

    blocks, width, vocab = MODELS[name]
    shape = {"num_hidden_layers": blocks, "hidden_size": width, "intermediate_size": 4 * width}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    batch = {"global_batch": micro_batches * MICRO_ROWS, "micro_batch": MICRO_ROWS, "workers": ranks}
    train = Train.model_validate(batch | {"precision": "fp32", "parallel": parallel})
    manifest = TokenManifest.without_corpus(SEQ, vocab)
    model = Model(type="llama", config=shape | heads)
    return TrainingJob("student", model, vocab, train, SEED, "", manifest, None)


class Course:
    """A training that goes on for as many steps as it is told, on the same rows at every step, which it learns by heart."""

    def __init__(self, job: Any) -> None:
        import torch

        from orchestrator.losses.schedule import ObjectiveSchedule
        from orchestrator.student.trainer import start_trainer

        self._job, self.trainer = job, start_trainer(job)
        self._schedule = ObjectiveSchedule(job.objective, job.train.steps, torch.device("cpu"))
        self._rows = rows_of(job)
        self.losses: list[float] = []

    def run(self, steps: int) -> None:
        from orchestrator.student.worker import train_step

        for _ in range(steps):
            means = train_step(self.trainer, self._job, self._schedule, len(self.losses), self._rows).means
            self.losses.append(float(means[0]))


def rows_of(job: Any) -> list[Any]:
    import torch

    from orchestrator.student.feed import MicroBatch

    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(job.vocab_size, (job.train.global_batch, SEQ + 1), generator=generator)
    return [MicroBatch(part, None, {}) for part in ids.split(MICRO_ROWS)]


# What runs on one process: the truth about the losses, and the times of the layers.


def alone() -> dict[str, Any]:
    """Losses of every model by number of micro-batches, and seconds of each of its layers."""
    wanted = sorted({m for counts in MICRO_BATCHES.values() for m in counts})
    return {name: {"layers": layer_seconds(name), "losses": {m: plain_losses(name, m) for m in wanted}} for name in MODELS}


def plain_losses(name: str, micro_batches: int) -> list[float]:
    course = Course(training_job(name, micro_batches, 1, {"kind": "zero", "stage": 1}))
    course.run(CHECKED_STEPS)
    course.trainer.engine.destroy()
    moved = min(abs(b / a - 1) for a, b in pairwise(course.losses))
    assert moved > 10 * TOLERANCE, f"{name}: training moves the loss by {moved:.1e} only"
    return course.losses


def layer_seconds(name: str) -> list[Seconds]:
    """CPU-seconds of the layers as the pipeline lists them: embedding, blocks (each the mean of all), last norm, loss."""
    import torch

    from orchestrator.losses.objective import Mixture
    from orchestrator.losses.schedule import ObjectiveSchedule
    from orchestrator.models.stages import pieces
    from orchestrator.student.distiller import head_loss, start_model

    job = training_job(name, 1, 1, {"kind": "zero", "stage": 1})
    model, micro = start_model(job), rows_of(job)[0]
    cut = pieces(model)
    mixture: Mixture = ObjectiveSchedule(job.objective, 1, torch.device("cpu")).at(0)
    layers = [cut.embedding, *cut.blocks, cut.final, lambda hidden: head_loss(model, hidden, micro.ids, mixture, None)[0]]
    found = [timed_passes(layers, micro.ids[:, :-1]) for _ in range(REPEATS)][REPEATS // 4 :]
    medians = [tuple(statistics.median(times) for times in zip(*layer, strict=True)) for layer in zip(*found, strict=True)]
    block = tuple(statistics.mean(times) for times in zip(*medians[1 : 1 + len(cut.blocks)], strict=True))
    return [medians[0], *[block] * len(cut.blocks), *medians[-2:]]  # type: ignore[list-item]


def timed_passes(layers: list[Any], ids: Any) -> list[Seconds]:
    forward, backward, outputs, inputs = [], [], [], []
    hidden = ids
    for layer in layers:
        inputs.append(hidden)
        started = time.process_time()
        outputs.append(layer(hidden))
        forward.append(time.process_time() - started)
        hidden = outputs[-1].detach().requires_grad_()
    gradient = None
    for before, after in zip(reversed(inputs), reversed(outputs), strict=True):
        started = time.process_time()
        after.backward(gradient)
        backward.append(time.process_time() - started)
        gradient = before.grad
    return list(zip(forward, reversed(backward), strict=True))


# What runs on several processes.


@dataclass
class Clocks:
    """Seconds since some time: of the wall, of this process's CPU, and of waiting for a core."""

    wall: float
    cpu: float
    queued: float

    @classmethod
    def now(cls) -> Clocks:
        queued = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
        return cls(time.perf_counter(), time.process_time(), queued)

    def since(self, start: Clocks) -> dict[str, float]:
        return {name: value - vars(start)[name] for name, value in vars(self).items()}


def together() -> list[dict[str, Any]]:
    """Every model and number of micro-batches on the processes of this group."""
    import torch.distributed as dist

    ranks = dist.get_world_size()
    return [by_turns(name, micro_batches, ranks) for name in MODELS for micro_batches in MICRO_BATCHES[ranks]]


def by_turns(name: str, micro_batches: int, ranks: int) -> dict[str, Any]:
    """Both schedules in rounds: clocks by schedule, round and rank."""
    import torch.distributed as dist

    courses = {}
    for schedule in SCHEDULES:
        parallel = {"kind": "pipeline", "stages": ranks, "schedule": schedule}
        courses[schedule] = Course(training_job(name, micro_batches, ranks, parallel))
        courses[schedule].run(1)
    clocks: dict[str, list[Any]] = {schedule: [] for schedule in SCHEDULES}
    for turn in range(ROUNDS):
        for schedule in SCHEDULES[:: 1 if turn % 2 else -1]:
            dist.barrier()
            started = Clocks.now()
            courses[schedule].run(1)
            gathered: list[Any] = [None] * ranks
            dist.all_gather_object(gathered, Clocks.now().since(started))
            clocks[schedule].append(gathered)
    result = {"model": name, "ranks": ranks, "micro_batches": micro_batches, "clocks": clocks, "load": os.getloadavg()[0]}
    result["losses"] = {schedule: course.losses for schedule, course in courses.items()}
    result["parts"] = {
        schedule: [int(bound) for bound in course.trainer.engine.module.parts] for schedule, course in courses.items()
    }
    for course in courses.values():
        course.trainer.engine.destroy()
    return result


# The simulation.


@dataclass(frozen=True)
class Transfer:
    """One end's view of it."""

    key: tuple[Any, ...]
    """Source, target, how many have gone that way before, and what it is: ends that disagree on one of them wait forever."""
    sends: bool


Instruction = float | list[Transfer]
"""Seconds of computation, or transfers that start together and are waited for together."""


def instructions(schedule: str, ranks: int, rank: int, micro_batches: int, pieces: list[Seconds]) -> Iterator[Instruction]:
    """What a rank does in a step, one after another, by DeepSpeed's schedule."""
    from deepspeed.runtime.pipe.schedule import DualPipeVSchedule, TrainSchedule

    made = {"1f1b": TrainSchedule, "dualpipev": DualPipeVSchedule}[schedule](micro_batches, ranks, rank)
    before: Counter[tuple[int, int]] = Counter()
    queued: list[Transfer] = []
    for command in (command for step in made.steps() for command in step):
        phase = getattr(command, "phase", 0)
        if command.name in ("ForwardPass", "BackwardPass"):
            yield pieces[rank if phase == 0 else 2 * ranks - 1 - rank][command.name == "BackwardPass"]
        elif command.name.startswith(("Send", "Recv")):
            sends, what = command.name.startswith("Send"), command.name[4:]
            later = sends == (what == "Activation")  # with the piece that comes next in the model
            other = rank + (1 if later == (phase == 0) else -1)
            way = (rank, other) if sends else (other, rank)
            queued.append(Transfer((*way, before[way], what, phase), sends))
            before[way] += 1
        if queued and (schedule == "1f1b" or command.name == "CommitP2P"):  # 1F1B waits for each at once
            yield queued
            queued = []


def simulated(schedule: str, ranks: int, micro_batches: int, pieces: list[Seconds]) -> tuple[float, float]:
    """Seconds of the passes of a step, and the share of it in which a rank waits, mean over the ranks.

    `pieces` are as long as the model is cut. A transfer is over, for both ends, when the later one has come to it.
    """
    coming = [deque(instructions(schedule, ranks, rank, micro_batches, pieces)) for rank in range(ranks)]
    busy = sum(item for items in coming for item in items if isinstance(item, float))
    clock, posted = [0.0] * ranks, {}
    while any(coming):
        left = sum(map(len, coming))
        for rank, items in enumerate(coming):
            while items:
                if isinstance(items[0], float):
                    clock[rank] += items[0]
                else:
                    for end in items[0]:
                        posted.setdefault((end.key, end.sends), clock[rank])
                    if any((end.key, not end.sends) not in posted for end in items[0]):
                        break
                    clock[rank] = max(clock[rank], *(posted[end.key, not end.sends] for end in items[0]))
                items.popleft()
        assert sum(map(len, coming)) < left, "the ranks wait for each other"
    return max(clock), 1 - busy / (ranks * max(clock))


# The figures.


def figures(case: dict[str, Any], schedule: str, layers: list[Seconds]) -> dict[str, Any]:
    """What one schedule did in one case, beside what it should have done."""
    rounds, bounds = case["clocks"][schedule], case["parts"][schedule]
    totals = {name: sum(clock[name] for turn in rounds for clock in turn) for name in ("wall", "cpu", "queued")}
    fastest = min(rounds, key=lambda turn: turn[0]["wall"])
    ranks, micro_batches = case["ranks"], case["micro_batches"]
    pieces = [added(layers[start:end]) for start, end in pairwise(bounds)]
    mean = tuple(seconds / len(pieces) for seconds in added(layers))
    seconds, idle = simulated(schedule, ranks, micro_batches, pieces)
    seconds_even, idle_even = simulated(schedule, ranks, micro_batches, [mean] * len(pieces))  # type: ignore[list-item]
    return {
        "layers": [end - start for start, end in pairwise(bounds)],
        "step_s": [round(turn[0]["wall"], 3) for turn in rounds],
        "step_s_fastest": round(min(turn[0]["wall"] for turn in rounds), 3),
        "step_s_simulated": round(seconds, 3),
        "step_s_simulated_even": round(seconds_even, 3),
        "cpu_s": round(totals["cpu"] / ROUNDS, 3),
        "idle_measured": round(1 - totals["cpu"] / totals["wall"], 3),
        "idle_measured_fastest": round(1 - sum(clock["cpu"] for clock in fastest) / sum(clock["wall"] for clock in fastest), 3),
        "queued_for_core": round(totals["queued"] / totals["wall"], 3),
        "idle_simulated": round(idle, 3),
        "idle_simulated_even": round(idle_even, 3),
        "idle_formula": round(bubble(Layout(pipeline=ranks, schedule=schedule), micro_batches), 3),  # type: ignore[arg-type]
    }


def added(layers: list[Seconds]) -> Seconds:
    return sum(forward for forward, _ in layers), sum(backward for _, backward in layers)


def compared(case: dict[str, Any], single: dict[str, Any]) -> dict[str, Any]:
    """Both schedules of one case side by side; `step_ratio` is the median over rounds."""
    true = single["losses"][str(case["micro_batches"])]
    off = max(abs(a / b - 1) for losses in case["losses"].values() for a, b in zip(losses, true, strict=False))
    apart = max(abs(a / b - 1) for a, b in zip(*case["losses"].values(), strict=True))
    assert max(off, apart) < TOLERANCE, f"{case['model']} on {case['ranks']} ranks: losses differ by {max(off, apart):.1e}"
    by_schedule = {schedule: figures(case, schedule, single["layers"]) for schedule in SCHEDULES}
    one, dual = (by_schedule[schedule] for schedule in SCHEDULES)
    return {
        **{key: case[key] for key in ("model", "ranks", "micro_batches")},
        "load": round(case["load"], 2),
        "loss_difference_to_one_process": off,
        "loss_difference_between_schedules": apart,
        "step_ratio": round(statistics.median(b / a for a, b in zip(one["step_s"], dual["step_s"], strict=True)), 3),
        "step_ratio_fastest": round(dual["step_s_fastest"] / one["step_s_fastest"], 3),
        "step_ratio_simulated": round(dual["step_s_simulated"] / one["step_s_simulated"], 3),
        "step_ratio_simulated_even": round(dual["step_s_simulated_even"] / one["step_s_simulated_even"], 3),
        **by_schedule,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    sys.path.append(str(HERE.parent.parent))
    from orchestrator.runtime.environment import prepare_deepspeed
    from tests.parity.ranks import run_on_ranks

    prepare_deepspeed(on_gpu=False)  # the schedules are read in this process
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        single = run_on_ranks(1, Path(folder), alone)
        cases = [case for ranks in MICRO_BATCHES for case in run_on_ranks(ranks, Path(folder), together)]
    rows = [compared(case, single[case["model"]]) for case in cases]
    loads.append(os.getloadavg()[0])
    for row in rows:
        print(json.dumps(row))
    result = {
        "machine": machine(),
        "cores": os.cpu_count(),
        "load_before_and_after": loads,
        "layer_ms": {
            name: [[round(1e3 * s, 2) for s in found["layers"][layer]] for layer in (0, 1, -2, -1)]
            for name, found in single.items()
        },
        "cases": rows,
    }
    keep("pipelines", result)


if __name__ == "__main__":
    main()
