"""Nodes that are about to be taken away: what runs on them is to be saved before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import state


class LeavingNodes:
    """Watches for nodes that Ray drains, as it does before an autoscaler or a cloud takes them away."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def save_checkpoints(self, board: Any, warn: Callable[[str], None]) -> None:
        """Ask all trainings for a checkpoint when a node begins to leave."""
        new = set(state.get_draining_nodes()) - self._known
        if not new:
            return
        self._known |= new
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        for node in sorted(new):
            warn(f"node {addresses.get(node, node[:6])} is being taken away; a checkpoint is saved first")
        board.ask_for_checkpoint.remote()
