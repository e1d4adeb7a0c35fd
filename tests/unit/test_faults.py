"""Which failures another attempt may mend; texts as CUDA, NCCL, gloo and Ray write them."""

from __future__ import annotations

import pickle

import pytest
import ray.exceptions as ray_errors
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from orchestrator.errors import DataError
from orchestrator.faults import RETRIED, Fault, classify, diagnose

ADVICE = """
Search for `cudaError{}' in https://docs.nvidia.com/cuda/cuda-runtime-api for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
"""What torch writes below every CUDA error; it speaks of assertions whatever has happened."""

FAULTY = [
    "CUDA error: uncorrectable ECC error encountered" + ADVICE.format("ECCUncorrectable"),
    "CUDA error: unspecified launch failure" + ADVICE.format("LaunchFailure"),
    "CUDA error: an illegal memory access was encountered" + ADVICE.format("IllegalAddress"),
    "CUDA error: unknown error" + ADVICE.format("Unknown"),
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa)`",
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call failed.",
    "HIP error: the operation cannot be performed in the present state: hipErrorIllegalState",
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
]
REPEATED = [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory" + ADVICE.format("MemoryAllocation"),
    "CUDA error: device-side assert triggered" + ADVICE.format("Assert"),
    "CUDA error: no kernel image is available for execution on the device" + ADVICE.format("NoKernelImageForDevice"),
    "NCCL error in: NCCLUtils.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for details)\nncclInvalidUsage: Duplicate GPU",
    "The size of tensor a (3) must match the size of tensor b (4)",
]
ECHOES = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41833",
    "NCCL communicator was aborted on rank 1.",
    "failed to recv, got 0 bytes",
]


class AcceleratorError(RuntimeError):
    """As torch.AcceleratorError, whose constructor is torch's own."""


@pytest.mark.parametrize("text", FAULTY)
def test_accelerator_faults_are_retried(text: str) -> None:
    assert classify(AcceleratorError(text)) is Fault.ACCELERATOR
    assert classify(RuntimeError(text), alone=True) is Fault.ACCELERATOR
    assert classify(ValueError(text)) is Fault.BUG, "only what torch raises speaks of devices"


@pytest.mark.parametrize("text", REPEATED)
def test_errors_of_the_program_are_not(text: str) -> None:
    assert classify(AcceleratorError(text), alone=True) is Fault.BUG


@pytest.mark.parametrize("text", ECHOES)
def test_a_broken_link_needs_a_neighbour(text: str) -> None:
    assert classify(RuntimeError(text)) is Fault.BROKEN_LINK
    assert classify(RuntimeError(text), alone=True) is Fault.BUG


def task_error(cause: Exception) -> Exception:
    """`cause` as a driver gets it: pickled and wrapped, an instance of the class of its cause."""
    return pickle.loads(pickle.dumps(ray_errors.RayTaskError("label", "a traceback", cause))).as_instanceof_cause()


def test_wrappers_of_ray_are_looked_into() -> None:
    fault = RuntimeError(FAULTY[0])
    wrapped = ray_errors.UserCodeException("UDF failed to process a data block.")
    wrapped.__cause__ = fault
    assert classify(task_error(fault)) is Fault.ACCELERATOR
    assert diagnose(wrapped) == (Fault.ACCELERATOR, fault)
    assert classify(WorkerHealthCheckFailedError("a check failed", task_error(fault))) is Fault.ACCELERATOR
    assert classify(task_error(DataError("row 3"))) is Fault.USER
    assert classify(task_error(KeyError("row"))) is Fault.BUG


def test_the_worst_of_a_group_decides() -> None:
    echo, fault, bug = RuntimeError(ECHOES[0]), RuntimeError(FAULTY[0]), ValueError("not enough values to unpack")
    dead = ray_errors.ActorDiedError()
    assert diagnose(WorkerGroupError("", {0: echo, 1: fault})) == (Fault.ACCELERATOR, fault)
    assert diagnose(WorkerGroupError("", {0: echo, 1: dead})) == (Fault.WORKER_DEATH, dead)
    assert diagnose(WorkerGroupError("", {0: fault, 1: bug, 2: dead})) == (Fault.BUG, bug)


def test_errors_of_ray() -> None:
    assert classify(ray_errors.ActorDiedError()) is Fault.WORKER_DEATH
    assert classify(ray_errors.OutOfMemoryError("a worker was killed")) is Fault.WORKER_DEATH
    assert classify(ray_errors.NodeDiedError("the node")) is Fault.LOST_NODE
    lost = ray_errors.ActorDiedError()
    lost.error_msg = "The actor died because its node has died. Node Id: 41"
    assert classify(lost) is Fault.LOST_NODE
    assert classify(ControllerError(WorkerGroupStartupTimeoutError(2))) is Fault.NO_ROOM
    assert classify(ray_errors.ActorDiedError(ray_errors.RayTaskError("init", "KeyError", KeyError("a")))) is Fault.BUG
    init = ray_errors.RayTaskError("init", FAULTY[0], RuntimeError(FAULTY[0]))
    assert classify(ray_errors.ActorDiedError(init)) is Fault.ACCELERATOR


def test_every_kind_is_either_retried_or_not() -> None:
    assert set(RETRIED) == set(Fault)
