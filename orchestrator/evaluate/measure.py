"""Teacher, student and baseline on the same held-out windows, one after the other.

One model is in memory at a time, and of the teacher nothing but its head: what it says lies in the log that it wrote while it
labelled. Only the student has to be measured; what cannot be said of the others is left out with a warning.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from orchestrator.errors import find_user_error, one_line
from orchestrator.evaluate.bootstrap import Intervals, intervals
from orchestrator.evaluate.model import AnsweringTeacher, Result, Subject, measure_model, measure_teacher
from orchestrator.evaluate.samples import SampleToken
from orchestrator.evaluate.tokens import by_token
from orchestrator.evaluate.windows import Heldout
from orchestrator.models.build import device
from orchestrator.models.continuations import chosen_prompts, texts_of
from orchestrator.runtime.environment import limit_threads
from orchestrator.spec.labels import TopkLabels
from orchestrator.store.heldout import CONTINUATIONS

SAY_EVERY_S = 30.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """The measurements of teacher, student and baseline."""

    figures: dict[str, dict[str, float]]
    """By model, as report.json has them, without those that could not be measured."""
    by_token: dict[str, Any]
    """The section `heldout` of report.json; empty without a teacher."""
    samples: tuple[list[SampleToken], ...]
    generated: list[dict[str, str | None]]
    """By prompt: `prompt`, and a text by model, None from one that failed; without models that were not asked."""
    intervals: Intervals | None


class Bench:
    """The process that measures, one model after the other; after a failure a new one."""

    def __init__(self, takes: Mapping[str, float], micro_batch: int, say: Tell) -> None:
        self._takes, self._micro_batch, self._say = takes, micro_batch, say
        self._actor: Any = None

    def teacher(self, heldout: Heldout, teacher: AnsweringTeacher) -> Result:
        """Measure the teacher by its answers."""
        return self._ask("teacher", heldout, teacher, self._micro_batch)

    def model(self, name: str, subject: Subject, heldout: Heldout, teacher: AnsweringTeacher | None) -> Result:
        """Measure a model beside the answers of `teacher`, if they can be read."""
        result = self._ask("model", name, subject, heldout, teacher, self._micro_batch)
        if result.failure:
            self.end()  # its device may not work any more
        return result

    def end(self) -> None:
        """End the process."""
        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = None

    def _ask(self, what: str, *args: Any) -> Result:
        if self._actor is None:
            self._actor = self._started()
        try:
            return ray.get(getattr(self._actor, what).remote(*args))
        except Exception:
            self.end()
            raise

    def _started(self) -> Any:
        """A new process, as soon as there is room for one."""
        actor: Any = _Measurer.options(num_cpus=self._takes["CPU"], num_gpus=self._takes["GPU"]).remote(
            max(1, int(self._takes["CPU"])), self._takes["GPU"]
        )
        waited = 0.0
        while not ray.wait([actor.__ray_ready__.remote()], timeout=SAY_EVERY_S)[0]:
            waited += SAY_EVERY_S
            need = ", ".join(f"{amount:g} {kind}" for kind, amount in self._takes.items() if amount)
            self._say(f"evaluate: waiting for a process with {need}, {waited:.0f} s so far")
        return actor


@ray.remote(max_restarts=3, max_task_retries=3)
class _Measurer:
    def __init__(self, threads: int, gpus: float) -> None:
        limit_threads(threads)
        torch.set_num_threads(threads)
        self._on = device(gpus)

    def teacher(self, heldout: Heldout, teacher: AnsweringTeacher, micro_batch: int) -> Result:
        return measure_teacher(heldout, teacher, micro_batch, self._on)

    def model(
        self, name: str, subject: Subject, heldout: Heldout, teacher: AnsweringTeacher | None, micro_batch: int
    ) -> Result:
        try:
            return measure_model(name, subject, heldout, teacher, micro_batch, self._on)
        finally:  # the next one finds its room
            gc.collect()
            if self._on.type == "cuda":
                torch.cuda.empty_cache()


def measure(heldout: Heldout, teacher: AnsweringTeacher, subjects: Mapping[str, Subject], bench: Bench, warn: Tell) -> Measured:
    """Measure the teacher by its answers, and `subjects`, by name, among them `student`.

    Raises what the student's measurement raises, `DataError` if its loss on the windows is not finite among it. What else fails
    is left out, and told to `warn`.
    """
    found: dict[str, Result] = {}
    try:
        found["teacher"] = bench.teacher(heldout, teacher)
    except Exception as error:
        warn(f"evaluate: the teacher could not be measured, and no model be compared with it: {_reason(error)}")
    compared = teacher if "teacher" in found else None
    for name, subject in subjects.items():
        try:
            found[name] = bench.model(name, subject, heldout, compared)
        except Exception as error:
            if name == "student":
                raise
            warn(f"evaluate: the {name} could not be measured: {_reason(error)}")
    bench.end()
    for name, result in found.items():
        if result.failure:
            warn(f"evaluate: the {name} was measured, but could not continue the report's prompts: {result.failure}")
    documents = heldout.rows().documents
    assert documents is not None
    return Measured(
        {name: result.figures for name, result in found.items()},
        _by_token(heldout, found),
        found["student"].samples,
        _generated(heldout, {name: found[name].texts for name in subjects if name in found}, warn),
        intervals({name: result.nats for name, result in found.items()}, heldout.targets(), documents),
    )


def _by_token(heldout: Heldout, found: Mapping[str, Result]) -> dict[str, Any]:
    entropy = found["teacher"].entropy if "teacher" in found else None
    if entropy is None:
        return {}
    labels = heldout.log.labels
    models = {name: result.comparison for name, result in found.items() if result.comparison}
    return by_token(entropy, models) | {"teacher_ids": labels.k if isinstance(labels, TopkLabels) else None}


def _generated(heldout: Heldout, texts: Mapping[str, list[str] | None], warn: Tell) -> list[dict[str, str | None]]:
    """The report's prompts with what each model says, the teacher's as it was kept, if it was."""
    try:
        rows = heldout.rows()
        prompts = chosen_prompts(torch.from_numpy(rows.ids).long(), torch.from_numpy(rows.counted()))
        beginnings = texts_of(prompts, heldout.tokenizer)
        kept: list[str] | None = heldout.kept(CONTINUATIONS)
    except Exception as error:
        warn(f"evaluate: the report shows no prompts and their continuations: {_reason(error)}")
        return []
    models = ({"teacher": kept} if kept else {}) | dict(texts)
    return [
        {"prompt": prompt} | {name: own[i] if own else None for name, own in models.items()}
        for i, prompt in enumerate(beginnings)
    ]


def _reason(error: Exception) -> str:
    return str(find_user_error(error) or one_line(f"{type(error).__name__}: {error}"))
