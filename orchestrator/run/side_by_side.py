"""Steps of a run that go on at the same time, and how they end together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

from orchestrator.errors import EnvironmentFault
from orchestrator.run.record import reason_of
from orchestrator.run.recorder import Run

ABORT_GRACE_S = 30.0


class SideBySide:
    """Steps that run at the same time, each in a thread of the driver that only waits for Ray."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []
        self.trainings: list[Future[Any]] = []
        """Steps that have begun, and save what they have when the run is aborted."""

    def start(self, step: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start `step(*args)`."""
        return self._start(step, args, [], None)

    def train(self, step: Callable[..., Any], *args: Any, after: Future[Any] | None = None) -> Future[Any]:
        """Start the training `step(*args)`, once `after` has ended well; one after a failed step is not started."""
        return self._start(step, args, self.trainings, after)

    def _start(
        self, step: Callable[..., Any], args: tuple[Any, ...], begun: list[Future[Any]], after: Future[Any] | None
    ) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            try:
                if after is not None:
                    after.result()
                begun.append(future)
                future.set_result(step(*args))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, name=step.__name__, daemon=True).start()
        self.futures.append(future)
        return future


@contextmanager
def side_by_side(run: Run) -> Iterator[SideBySide]:
    """Wait for all steps started inside. If one fails, or the user stops the run, abort the others and raise the cause.

    Trainings that are aborted save a checkpoint first, for which they have `ABORT_GRACE_S`.
    """
    work = SideBySide()
    try:
        yield work
        ended, _ = wait(work.futures, return_when=FIRST_EXCEPTION)
        for step in ended:
            step.result()
    except BaseException as error:
        with suppress(EnvironmentFault):  # of a storage that fails now, too; what ended the run is to be known
            run.end(error)
        run.abort(reason_of(error))
        if any(not training.done() for training in work.trainings):
            run.display.say(f"saving checkpoints, for at most {ABORT_GRACE_S:.0f} s")
            wait(work.trainings, timeout=ABORT_GRACE_S)
        raise
