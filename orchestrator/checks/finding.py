"""A finding is a fault or a risk of a job that is known before the job runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from orchestrator.errors import DistillError, one_line


@dataclass(frozen=True)
class Finding:
    """Something that a run of a job would meet."""

    text: str
    """One line, which begins with the key of the job file."""
    refusal: type[DistillError] | None = None
    """Class of the error that a run ends with; None if it goes on."""

    @property
    def key(self) -> str:
        return self.text.partition(":")[0]

    @property
    def line(self) -> str:
        return f"{'refused' if self.refusal else 'warning'}  {one_line(self.text)}"

    def as_dict(self) -> dict[str, str | bool]:
        return {"key": self.key, "text": one_line(self.text), "refused": self.refusal is not None}


Check = Callable[[], Iterable[Finding]]


def gathered(check: Check) -> Iterator[Finding]:
    """Yield the findings of `check`; a user error that it raises becomes a finding too."""
    try:
        yield from check()
    except DistillError as error:
        yield Finding(str(error), type(error))
