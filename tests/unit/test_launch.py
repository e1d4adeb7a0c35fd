"""Which of a worker group's exceptions is a bug, and which is the echo of a neighbour's death."""

from __future__ import annotations

import pytest

from orchestrator.student.launch import _programming_error


class Failed(Exception):
    def __init__(self, *raised: Exception) -> None:
        super().__init__("a group failed")
        self.worker_failures = dict(enumerate(raised))


ECHOES = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41833",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "NCCL communicator was aborted on rank 1.",
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store: Broken pipe",
    "failed to recv, got 0 bytes",
]


@pytest.mark.parametrize("text", ECHOES)
def test_a_broken_link_is_no_bug(text: str) -> None:
    assert _programming_error(Failed(RuntimeError(text)), alone=False) is None
    assert isinstance(_programming_error(Failed(RuntimeError(text)), alone=True), RuntimeError), "nobody is at the other end"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch: value tensor of shape [0, 0] cannot be broadcast to indexing result of shape [0, 4]"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ValueError("not enough values to unpack"),
    ],
)
def test_what_trying_again_would_only_repeat_is_a_bug(error: Exception) -> None:
    assert _programming_error(Failed(RuntimeError(ECHOES[0]), error), alone=False) is error
