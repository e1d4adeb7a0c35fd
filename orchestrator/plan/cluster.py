"""Devices and clusters, as far as an estimate needs them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from orchestrator.errors import SpecError

GB, TFLOPS = 10**9, 10**12
UTILISATION = 0.4
"""Share of the peak that large dense models reach in training: assumed where nothing was measured."""
DEVICES_A_NODE = 8
NODE_LINK = 50 * GB
"""Bytes per second and device between nodes, one way: 400 Gbit/s."""


@dataclass(frozen=True)
class Device:
    """The device that one worker computes on. Rates are the vendor's, dense, per second."""

    name: str
    memory: int | None
    """Bytes; None for a CPU core, whose memory is the machine's."""
    flops: dict[str, float]
    """Peak by precision; one that is missing runs as bf16."""
    bandwidth: float
    """Bytes of its memory."""
    link: float
    """Bytes to a device of the same node, one way."""

    def peak(self, precision: str) -> float:
        return self.flops.get(precision, self.flops["bf16"])

    @property
    def on_gpu(self) -> bool:
        return self.memory is not None


def _gpu(name: str, memory: float, fp32: float, bf16: float, fp8: float | None, bandwidth: float, link: float) -> Device:
    """From GB, TFLOP/s and GB/s. `fp32` is what its cores do: torch leaves TF32 off."""
    rates = {"fp32": fp32 * TFLOPS, "bf16": bf16 * TFLOPS} | ({"fp8": fp8 * TFLOPS} if fp8 else {})
    return Device(name, int(memory * GB), rates, bandwidth * GB, link * GB)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("A100-40", 40, 19.5, 312, None, 1555, 300),
        _gpu("A100-80", 80, 19.5, 312, None, 2039, 300),
        _gpu("H100", 80, 67, 989, 1979, 3350, 450),
        _gpu("H200", 141, 67, 989, 1979, 4800, 450),
        _gpu("H800", 80, 67, 989, 1979, 3350, 200),
        _gpu("B200", 180, 75, 2250, 4500, 8000, 900),
        _gpu("L4", 24, 30.3, 121, 242, 300, 32),
        _gpu("L40S", 48, 91.6, 362, 733, 864, 32),
        # One core with AVX-512 and bf16 instructions, as measured; a machine's cores share its memory.
        Device("CPU", None, {"fp32": 80e9, "bf16": 440e9}, 10 * GB, 10 * GB),
    )
}
"""From data sheets, without sparsity; links are NVLink where there is one, else PCIe. Prices differ too much to stand here."""
_ALIASES = {"A100": "A100-80", "CORE": "CPU"}


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind."""

    device: Device
    devices: int
    devices_a_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.devices_a_node)

    def link(self, group: int) -> float:
        """Bytes per second and device, one way, of the slowest link inside a group of `group` neighbouring devices."""
        return self.device.link if group <= self.devices_a_node else min(self.device.link, NODE_LINK)

    def __str__(self) -> str:
        return f"{self.devices} {self.device.name}"


def parse_cluster(text: str) -> Cluster:
    """`128xH100` (in nodes of eight) or `16x8xH100` (nodes, devices in each). Raises `SpecError`."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)", text.strip())
    if found is None:
        raise SpecError(f"cluster: {text!r} is neither COUNTxDEVICE (128xH100) nor NODESxCOUNTxDEVICE (16x8xH100)")
    nodes, count, name = found.groups()
    device = DEVICES.get(_ALIASES.get(name.upper(), name.upper()))
    if device is None:
        raise SpecError(f"cluster: no device {name!r}; known are {', '.join(DEVICES)}")
    devices = int(nodes or 1) * int(count)
    if devices == 0:
        raise SpecError(f"cluster: {text!r} has no devices")
    return Cluster(device, devices, int(count) if nodes else min(devices, DEVICES_A_NODE))


@dataclass(frozen=True)
class Calibration:
    """Sustained rates of one worker of each side, in the planner's own count of work, so that its count's faults cancel."""

    student_flops_per_s: float
    teacher_flops_per_s: float
    activation_bytes_per_s: float = math.inf
    """Bytes of activations, for a student limited by memory too: kept by its blocks for the backward pass, and logits."""
    update_bytes_per_s: float = math.inf
    """Bytes of master weights and moments in the optimizer's step."""


def assumed_calibration(device: Device, student_precision: str, teacher_precision: str) -> Calibration:
    """`UTILISATION` of the peak. fp8 runs inside of matrix products only, so it is held against the bf16 peak, too low."""
    peaks = (device.peak("bf16" if p == "fp8" else p) for p in (student_precision, teacher_precision))
    student, teacher = (UTILISATION * peak for peak in peaks)
    return Calibration(student, teacher)
