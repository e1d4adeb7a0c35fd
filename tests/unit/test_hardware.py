"""What the report says of the machines that a run had."""

from __future__ import annotations

import os

import psutil
import pytest

from orchestrator.runtime import nodes
from orchestrator.runtime.nodes import Node


def test_machines_have_their_cores_memory_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Node("ab12", "10.0.0.1", {"CPU": 4.0, "GPU": 2.0, "accelerator_type:H200": 1.0, "node:10.0.0.1": 1.0})
    monkeypatch.setattr(nodes, "alive_nodes", lambda: [here])
    expected = {"node": "10.0.0.1", "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
    assert nodes.hardware() == [expected | {"gpus": ["H200", "H200"]}]


def test_each_machine_is_asked_and_one_without_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [Node("ab12", "a", {"CPU": 1.0}), Node("cd34", "b", {"CPU": 8.0, "GPU": 1.0})]
    answers = {"a": {"cores": 1, "memory_bytes": 10}, "b": {"cores": 8, "memory_bytes": 20}}
    monkeypatch.setattr(nodes, "alive_nodes", lambda: there)
    monkeypatch.setattr(nodes, "_on_each", lambda asked, _function: {node.name: answers[node.name] for node in asked})
    assert nodes.hardware() == [
        {"node": "a", "cores": 1, "memory_bytes": 10, "gpus": []},
        {"node": "b", "cores": 8, "memory_bytes": 20, "gpus": ["GPU"]},
    ]
