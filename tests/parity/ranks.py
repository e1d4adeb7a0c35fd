"""Programs on several processes that form a group, as Ray Train's workers do."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.runtime.environment import limit_threads, prepare_deepspeed

PATIENCE_S = 600.0
HEAVY = ["deepspeed", "orchestrator.student.worker", "transformers.models.llama.modeling_llama"]


def run_on_ranks(world: int, root: Path, program: Callable[..., Any], *args: Any) -> Any:
    """What `program(*args)` returned on rank 0 of `world`, as JSON. `root` is an empty folder's or a run's own.

    The heavy imports happen in one process, of which the ranks are forks; a fork of the test process would not be safe.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        multiprocessing.set_forkserver_preload(HEAVY)
        forkserver.ensure_running()
    started = time.monotonic()
    result = root / f"{program.__name__}-{world}-{uuid.uuid4().hex[:8]}.json"  # a rendezvous can be used once
    context = mp.start_processes(_main, (world, result, program, args), world, join=False, start_method="forkserver")
    assert context is not None
    while not context.join(timeout=1):
        if time.monotonic() - started > PATIENCE_S:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{program.__name__} on {world} ranks did not finish in {PATIENCE_S:.0f} s")
    print(f"{program.__name__} on {world} ranks: {time.monotonic() - started:.0f} s")
    return json.loads(result.read_text())


def _main(rank: int, world: int, result: Path, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    limit_threads(1)
    torch.set_num_threads(1)
    prepare_deepspeed(on_gpu=False)
    dist.init_process_group("gloo", init_method=f"file://{result}.rendezvous", rank=rank, world_size=world)
    found = program(*args)
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
