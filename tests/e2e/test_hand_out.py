"""What the teacher pool is handed: every row once, alone, in order, without a block for each beforehand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from orchestrator.runtime.session import quiet_ray_data
from orchestrator.teacher import hand_out
from orchestrator.teacher.hand_out import FewAhead, handed_out

ROWS = 60


@pytest.mark.slice
@pytest.mark.parametrize("most", [ROWS, 10], ids=["blocks beforehand", "blocks as they are used"])
def test_rows_come_alone_and_in_order(one_cpu: None, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    class Echo:
        """An actor that says which rows it is given together."""

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            time.sleep(0.05)
            return {"given": [",".join(map(str, batch["shard"]))]}

    monkeypatch.setattr(hand_out, "MOST_BLOCKS", most)
    waiting: list[int] = []
    look = FewAhead.max_task_output_bytes_to_read

    def looked(policy: FewAhead, op: Any) -> int | None:
        waiting.extend(policy._topology[later].total_enqueued_input_blocks() for later in op.output_dependencies)
        return look(policy, op)

    monkeypatch.setattr(FewAhead, "max_task_output_bytes_to_read", looked)
    quiet_ray_data()
    rows = handed_out([{"shard": shard, "position": shard} for shard in range(ROWS)])
    pool = ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2)
    echoed = rows.map_batches(Echo, batch_size=1, compute=pool, num_cpus=1)
    assert [row["given"] for row in echoed.iter_rows()] == [str(shard) for shard in range(ROWS)]
    if most < ROWS:
        assert 0 < max(waiting) < ROWS / 2, "few are made before they are used"


@pytest.fixture
def one_cpu() -> Any:
    """A cluster in which the actor takes all there is, so that whatever else needs a core would never run."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
