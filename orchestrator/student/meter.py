"""Figures that a training reports while it runs, and at the end."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.plan.length import progress_figures
from orchestrator.plan.schedule import learning_rate
from orchestrator.runtime.board import FIRST_STEP
from orchestrator.student.feed import Feed
from orchestrator.student.job import TrainingJob
from orchestrator.student.step import StepResult
from orchestrator.tracking import names

POST_EVERY_S = 1.0


class Meter:
    """Keeps the figures of each step on the device and posts them about once a second from rank 0."""

    def __init__(self, job: TrainingJob, board: Any, feed: Feed) -> None:
        self._job, self._board, self._feed = job, board, feed
        self._pending: list[tuple[int, StepResult, Any, torch.Tensor | None, dict[str, float]]] = []
        self._steps = self._done = 0
        self._last_loss = math.nan
        self._first_step_s = 0.0
        self._first_wait_s = 0.0
        self._started = self._flushed = time.perf_counter()
        self._waited = 0.0
        self._aside_s = self._flushed_aside_s = self._first_aside_s = 0.0
        self._stalled_s = 0.0
        self.saved(time.time(), 0.0)

    @contextmanager
    def aside(self, device: torch.device) -> Generator[None]:
        """Do something inside the block that is neither training nor waiting, and does not count as either."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was asked for before is training
        started = time.perf_counter()
        yield
        self._aside_s += time.perf_counter() - started

    def add(
        self, step: int, result: StepResult, grad_norm: Any, routing: torch.Tensor | None, heldout: dict[str, float]
    ) -> None:
        """Take the figures of one step: its result, the gradient's norm or None, those of routers [3], and the metrics of an
        evaluation after it.

        Tensors stay on their device, and nobody waits for it, until they are posted some steps later.
        """
        self._pending.append((step, result, grad_norm, routing, heldout))
        self._steps, self._done = self._steps + 1, step + 1
        if self._steps == 1:
            self.flush()
            self._first_step_s, self._first_wait_s = time.perf_counter() - self._started, self._feed.waited_s
            self._first_aside_s = self._aside_s
            if dist.get_rank() == 0:
                self._board.set_progress.remote(f"{self._job.stage}.{FIRST_STEP}", time.time())
        elif dist.get_rank() == 0 and time.perf_counter() - self._flushed >= POST_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Post what has been added."""
        if not self._pending:
            return
        points = [self._point(*pending) for pending in self._pending]  # which waits for the device, so that time is taken after
        now, tokens = time.perf_counter(), self._job.train.global_batch * self._job.manifest.seq_len * len(self._pending)
        waited = self._feed.waited_s - self._waited
        elapsed = now - self._flushed - (self._aside_s - self._flushed_aside_s)
        pace = {
            names.TRAIN_TOKENS_PER_S: tokens / elapsed,
            names.LABEL_WAIT_FRACTION: waited / elapsed,
            names.INTERVAL_S: elapsed,
            names.TRAIN_TOKENS: tokens,
            names.TRAIN_BUSY_S: elapsed - waited,
        }
        if self._stalled_s:
            pace[names.CHECKPOINT_STALL_S] = self._stalled_s
        points[-1][1].update(pace)
        self._post(points)
        self._pending, self._flushed, self._waited = [], now, self._feed.waited_s
        self._flushed_aside_s, self._stalled_s = self._aside_s, 0.0

    def saved(self, at_s: float, stalled_s: float) -> None:
        """Record that a checkpoint of the state at `at_s`, in seconds since 1970, has become durable.

        Training stood still for that for `stalled_s`, which belongs to its time.
        """
        self._stalled_s += stalled_s
        self._post([(0, {names.LAST_CHECKPOINT_TIME_S: at_s})])

    def summary(self) -> dict[str, float]:
        """Figures of this training as a whole, for its manifest; speeds of a resumed one, since it was resumed.

        Waiting for the very first labels is start-up and not counted as waiting.
        """
        manifest, steps = self._job.manifest, self._steps - 1
        length = {"steps": self._done, "steps_asked": self._job.steps}
        length |= progress_figures(self._done, self._job.train, sum(manifest.shard_rows), manifest.seq_len)
        elapsed = time.perf_counter() - self._started - self._first_step_s - (self._aside_s - self._first_aside_s)
        if steps <= 0:
            return length
        return length | {
            "final_loss_nats": self._last_loss,
            "tokens_per_s": steps * self._job.train.global_batch * self._job.manifest.seq_len / elapsed,
            "label_wait_fraction": (self._feed.waited_s - self._first_wait_s) / elapsed,
        }

    def _point(
        self, step: int, result: StepResult, grad_norm: Any, routing: torch.Tensor | None, heldout: dict[str, float]
    ) -> tuple[int, dict[str, float]]:
        if not result.applied:
            return step, heldout
        loss, ce, kd, inner, ahead = result.means.tolist()
        self._last_loss = loss
        figures = {
            names.LOSS: loss,
            names.CE_NATS: ce,
            names.LEARNING_RATE: learning_rate(self._job.train, step),
            names.GRAD_NORM: math.nan if grad_norm is None else float(grad_norm),
        }
        if self._job.soft is not None:
            figures[names.KD_NATS] = kd
        if self._job.objective.features:
            figures[names.FEATURE_LOSS] = inner
        if self._job.ahead.depth:
            figures[names.MTP_LOSS] = ahead
        if routing is not None:
            figures |= zip((names.ROUTER_AUX, names.EXPERT_IMBALANCE, names.DROPPED_FRACTION), routing.tolist(), strict=True)
        return step, figures | heldout

    def _post(self, points: list[tuple[int, dict[str, float]]]) -> None:
        if dist.get_rank() == 0:
            self._board.post.remote(names.stage_id(self._job.stage, self._job.key), points)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process ever held: what torch allocated on a GPU, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
