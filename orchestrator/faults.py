"""The kinds of failure of a process of the cluster, and which of them trying again may mend.

A failure reaches the driver as an exception of the process that raised it, inside wrappers of Ray's, or as an exception of
Ray's about a process that is gone. Both are told apart here by the names of their classes and by their texts, so that neither
Ray nor torch is needed. Whoever retries has to count: these functions know nothing of earlier failures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum

from orchestrator.errors import BROKEN_LINK, find_user_error


class Fault(Enum):
    """The kinds of failure; the value of each says it in words."""

    USER = "an error that the user can act on"
    BUG = "an error that would only be repeated"
    NO_ROOM = "the cluster had no room"
    ACCELERATOR = "a fault of an accelerator"
    LOST_NODE = "a node was lost"
    WORKER_DEATH = "a process died"
    BROKEN_LINK = "a process lost its neighbour"


RETRIED: Mapping[Fault, bool] = {
    Fault.USER: False,
    Fault.BUG: False,
    Fault.NO_ROOM: False,
    Fault.ACCELERATOR: True,
    Fault.LOST_NODE: True,
    Fault.WORKER_DEATH: True,
    Fault.BROKEN_LINK: True,
}
"""For each fault, true if the same work is worth another attempt, with a new process in place of the failed one."""

_ACCELERATOR = re.compile(
    r"(cuda|hip|xpu) (kernel |driver )?error|cudaError\w+|hipError\w+|CUDA_ERROR_\w+"
    r"|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_\w+"
    r"|uncorrectable ECC|unspecified launch failure|illegal memory access|device[ _]lost|fallen off the bus|NVLink"
    r"|nccl(UnhandledCuda|Internal|System)Error|NCCL.{0,200}unhandled (cuda|system) error|NCCL.{0,200}internal error",
    re.IGNORECASE | re.DOTALL,
)
"""The texts of CUDA, ROCm, XPU and NCCL about a device that no longer does what it is asked."""

_REPEATED = re.compile(
    r"out of memory|MemoryAllocation|device-side assert triggered|cudaErrorAssert|no kernel image|NoKernelImage|invalid device"
    r"|InvalidDevice|driver version is insufficient|InsufficientDriver|invalid argument|InvalidValue|invalid configuration"
    r"|InvalidConfiguration|not supported|NotSupported|NOT_SUPPORTED|INVALID_VALUE|ALLOC_FAILED|invalid usage|ncclInvalid",
)
"""The texts of the same libraries about a program or a machine, which another attempt meets again."""

_NO_ROOM = {
    "WorkerGroupStartupTimeoutError",
    "InsufficientClusterResourcesError",
    "TaskUnschedulableError",
    "ActorUnschedulableError",
}
_NODE_DIED = re.compile(r"node (has )?died|node was (lost|terminated|drained|preempted)", re.IGNORECASE)


def classify(error: BaseException, alone: bool = False) -> Fault:
    """The kind of `error`, however many wrappers of Ray's lie around it.

    A process that is `alone` has no neighbours, so that a broken link is an error of its own to it.
    """
    return diagnose(error, alone)[0]


def diagnose(error: BaseException, alone: bool = False) -> tuple[Fault, BaseException]:
    """The kind of `error` as `classify` tells it, and the exception inside of it that decides the kind.

    If several workers of a group failed, an error that would be repeated outweighs all others, and a broken link, which is
    what the neighbours of a failed process see, weighs least.
    """
    user_error = find_user_error(error)
    if user_error is not None:
        return Fault.USER, user_error
    found = [(_kind(inner, alone), inner) for inner in _unwrapped(error)]
    order = list(Fault)
    return min(found, key=lambda one: order.index(one[0]))


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that Ray's wrappers around them hold, and `error` itself if it is no wrapper."""
    inside = [getattr(error, name, None) for name in ("cause", "controller_failure", "health_check_failure", "_base_exc")]
    inside += [*getattr(error, "worker_failures", {}).values()]
    inside += [error.__cause__] if _is_of_ray(error) else []
    inner = [one for one in inside if isinstance(one, BaseException) and one is not error]
    if not inner:
        yield error
    for one in inner:
        yield from _unwrapped(one)


def _kind(error: BaseException, alone: bool) -> Fault:
    text = str(error)
    if _is_of_ray(error):
        return _kind_by_ray({base.__name__ for base in type(error).__mro__}, error, text)
    if isinstance(error, RuntimeError) and _ACCELERATOR.search(text):
        return Fault.BUG if _REPEATED.search(text) else Fault.ACCELERATOR
    if isinstance(error, RuntimeError) and BROKEN_LINK.search(text) and not alone:
        return Fault.BROKEN_LINK
    return _kind(error.__cause__, alone) if error.__cause__ is not None else Fault.BUG


def _kind_by_ray(names: set[str], error: BaseException, text: str) -> Fault:
    if names & _NO_ROOM:
        return Fault.NO_ROOM
    if getattr(error, "actor_init_failed", False):  # Ray keeps only the text of what a constructor raised
        return Fault.ACCELERATOR if _ACCELERATOR.search(text) and not _REPEATED.search(text) else Fault.BUG
    if names & {"NodeDiedError", "PreemptionError"} or getattr(error, "preempted", False) or _NODE_DIED.search(text):
        return Fault.LOST_NODE
    return Fault.WORKER_DEATH


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.startswith("ray.")
