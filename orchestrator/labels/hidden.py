"""Hidden soft labels: the teacher's last hidden state, for the student's side to apply the teacher's own head to.

Exact at any temperature up to the rounding of the state, and smaller than top-k where the vocabulary is large.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The torch stubs leave types open.

from __future__ import annotations

from orchestrator.labels.answer import Answer
from orchestrator.labels.layout import Arrays, Frame
from orchestrator.labels.packing import HiddenPacking
from orchestrator.labels.targets import Hidden
from orchestrator.labels.vectors import Vectors
from orchestrator.spec.labels import HiddenLabels


class HiddenKind(HiddenPacking):
    def __init__(self, spec: HiddenLabels, frame: Frame) -> None:
        super().__init__(spec, frame.shape)
        self._states = Vectors("states", spec, frame)
        self._head = frame.head

    def extract(self, answer: Answer, seeds: list[bytes]) -> Arrays:
        """`states` [rows, seq, width]."""
        return self._states.extract(answer.states)

    def targets(self, arrays: Arrays, temperature: float) -> Hidden:
        """States [rows, seq, width] with the teacher's head."""
        assert self._head is not None
        return Hidden(self._states.tensor(arrays), self._head)
