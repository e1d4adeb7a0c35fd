"""Checkpoints that are damaged, and such as somebody else has made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.store.records import MANIFEST, describe_folder
from orchestrator.student.job import TrainingJob
from tests.parity.course import Bench, Case, build_bench, checkpoint_of, course, interrupted, run_steps
from tests.parity.ranks import run_on_ranks
from tests.s3 import BUCKET, s3_server


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return build_bench(tmp_path_factory.mktemp("checkpoints"))


def restore_damaged(bench: Bench) -> dict[str, Any]:
    """The step that is resumed from, after one damage after another to the newest checkpoint that is still whole."""
    from orchestrator.student.checkpoint import restore_checkpoint
    from orchestrator.student.trainer import start_trainer

    world = dist.get_world_size()
    job = bench.job(Case("sampled", 2), world, f"damaged-{world}")
    interrupted(bench, job, 3)
    trainer = start_trainer(job)
    first, second = checkpoint_of(bench, job, 3), checkpoint_of(bench, job, 2)
    kept = sorted(path.name for path in first.parent.iterdir())
    found: dict[str, Any] = {"kept": kept}
    for name, damage in {
        "none": lambda: None,
        "manifest cut": lambda: os.truncate(first / MANIFEST, 20),
        "manifest gone": lambda: (first / MANIFEST).unlink(),
        "a byte of the last rank": lambda: flip_byte(sorted((second / "engine").glob("*optim_states.pt"))[-1]),
        "everything": lambda: shutil.rmtree(second),
    }.items():
        if name == "manifest cut" and world > 1:
            continue
        if dist.get_rank() == 0:
            damage()
        dist.barrier()
        try:
            found[name] = restore_checkpoint(trainer.engine, course(job), bench.store, job.folder)
        except Exception as error:
            found[name] = repr(error)
    trainer.engine.destroy()
    return found


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Malice:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._canary),))


def load_malice(bench: Bench) -> dict[str, Any]:
    """Whether a checkpoint with a true manifest and a foreign pickle was refused, and whether its code has run."""
    job = bench.job(Case("sampled", 1), 1, "malicious")
    folder, _ = interrupted(bench, job, 2)
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.pt")):
        canary, honest = bench.store.path(f"canary-{file.name}"), file.read_bytes()
        torch.save({"module": Malice(canary)}, file)
        sign(folder.parent)
        found[file.name] = {"guarded": attempt(bench, job, canary)}
        guard = os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        found[file.name]["unguarded"] = attempt(bench, job, canary)
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = guard
        file.write_bytes(honest)
    sign(folder.parent)
    found["honest"] = attempt(bench, job, bench.store.path("canary"))
    return found


def sign(checkpoint: Path) -> None:
    """Rewrite the manifest so that it names the files as they are."""
    document, files = json.loads((checkpoint / MANIFEST).read_text()), describe_folder(checkpoint)
    ranks = [{name: files[name].model_dump() for name in written} for written in document["ranks"]]
    (checkpoint / MANIFEST).write_text(json.dumps(document | {"ranks": ranks}))


def attempt(bench: Bench, job: TrainingJob, canary: Path) -> dict[str, Any]:
    from orchestrator.student.checkpoint import restore_checkpoint
    from orchestrator.student.trainer import start_trainer

    trainer = start_trainer(job)
    try:
        outcome: Any = restore_checkpoint(trainer.engine, course(job), bench.store, job.folder)
    except Exception as error:
        outcome = type(error).__name__
    trainer.engine.destroy()
    return {"outcome": outcome, "code ran": canary.exists()}


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_checkpoint_is_passed_over(bench: Bench, world: int) -> None:
    found = run_on_ranks(world, bench.store.root.parent, restore_damaged, bench)
    assert found == {
        "kept": ["step-000002", "step-000003"],
        "none": 3,
        **({"manifest cut": 2} if world == 1 else {}),
        "manifest gone": 2,
        "a byte of the last rank": 0,
        "everything": 0,
    }


def test_a_foreign_pickle_in_a_checkpoint_is_not_run(bench: Bench) -> None:
    found = run_on_ranks(1, bench.store.root.parent, load_malice, bench)
    assert found.pop("honest") == {"outcome": 2, "code ran": False}
    assert len(found) == 2, "the file of the model and that of the optimizer"
    for name, outcomes in found.items():
        assert not outcomes["guarded"]["code ran"], name
        assert isinstance(outcomes["guarded"]["outcome"], str), "refused with an error"
        assert outcomes["unguarded"]["code ran"], "without the guard the same file runs its code"


BESIDE = {
    "zero": [*(Case("sampled", stage) for stage in range(4)), *(Case("sampled", stage, "bf16") for stage in (1, 2, 3))],
    "pipeline": [Case("sampled", 1, strategy="1f1b", model="deep"), Case("hard", 1, strategy="dualpipev", model="deep")],
    "expert": [Case("hard", 1, strategy="ep2", model="experts"), Case("hard", 3, "bf16", strategy="ep2", model="experts")],
}


def written_beside_training(bench: Bench, kind: str) -> dict[str, Any]:
    """Whether a checkpoint that is copied as late as it may be is that of a training that stood still, and no later one."""
    from orchestrator.student.checkpoint import CheckpointWriter, save_checkpoint
    from orchestrator.student.snapshot import HostMemory
    from orchestrator.student.trainer import start_trainer

    found, fill, wait = {}, HostMemory.fill, CheckpointWriter._wait_for_the_copy
    for case in BESIDE[kind]:
        job = bench.job(case, dist.get_world_size(), "beside")
        trainer, schedule, asked = start_trainer(job), course(job), threading.Event()
        writer = CheckpointWriter(trainer.engine, schedule, bench.store, f"beside/{case.name}")

        def ask(writer: CheckpointWriter, asked: threading.Event = asked) -> None:
            asked.set()
            wait(writer)

        def late(memory: HostMemory, asked: threading.Event = asked) -> None:
            assert asked.wait(PATIENCE_S), "no update of the weights has asked for the copy"
            time.sleep(0.1)
            fill(memory)

        def keep(done: int, trainer: Any = trainer, schedule: Any = schedule, writer: Any = writer, case: Case = case) -> bool:
            if done == 2:
                save_checkpoint(trainer.engine, schedule, bench.store, f"still/{case.name}", done)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(HostMemory, "fill", late)
                    patch.setattr(CheckpointWriter, "_wait_for_the_copy", ask)
                    writer.start(done)
            if done == 3:
                writer.finish()
                save_checkpoint(trainer.engine, schedule, bench.store, f"later/{case.name}", done)
            return done < 3

        run_steps(bench, job, trainer, schedule, 0, keep)
        saved = writer.settled()
        assert saved is not None
        trainer.engine.destroy()
        checkpoints = {name: f"{name}/{case.name}/checkpoints/step-{step:06d}" for name, step in STEP_OF.items()}
        still, beside, later = (bench.store.path(key) for key in checkpoints.values())
        stalls: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stalls, saved.stalled_s)
        found[case.name] = {"still": alike(still, beside), "later": alike(later, beside), "stalls": stalls}
        dist.barrier()
    return found


PATIENCE_S = 60.0
STEP_OF = {"still": 2, "beside": 2, "later": 3}


def alike(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same, file by file and to the bit."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*.pt")) for root in (one, other)]
    assert names[0] == names[1] and names[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        return all(equal(*(torch.load(root / name, weights_only=False) for root in (one, other))) for name in names[0])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return equal(vars(one), vars(other)) if hasattr(one, "__dict__") else one == other


@pytest.mark.parametrize("kind", BESIDE)
def test_training_that_goes_on_changes_nothing_of_its_checkpoint(bench: Bench, kind: str) -> None:
    found = run_on_ranks(2, bench.store.root.parent, written_beside_training, bench, kind)
    assert len(found) == len(BESIDE[kind])
    for name, outcome in found.items():
        assert outcome["still"], name
        assert not outcome["later"], f"{name}: a step changes what is saved"
        assert min(outcome["stalls"]) >= 0.1, f"{name}: the update waited for the copy"


def through_the_bucket(bench: Bench, environment: dict[str, str], address: str, begin: bool) -> dict[str, Any]:
    """What a training comes to that goes on from a checkpoint in a directory and in a bucket; `begin` saves it there first."""
    from orchestrator.store.files import open_store
    from orchestrator.student.checkpoint import restore_checkpoint, save_checkpoint
    from orchestrator.student.trainer import start_trainer

    os.environ |= environment
    tempfile.tempdir = None  # where the one before may be remembered
    places = {"directory": bench.store, "bucket": open_store(address)}
    job, folder, found = bench.job(Case("sampled", 2), dist.get_world_size()), "elsewhere", {}
    if begin:
        trainer, schedule = start_trainer(job), course(job)

        def keep(done: int) -> bool:
            for store in places.values():
                save_checkpoint(trainer.engine, schedule, store, folder, done)
            return done < 3

        run_steps(bench, job, trainer, schedule, 0, keep)
        trainer.engine.destroy()
    for name, store in places.items():
        trainer, schedule = start_trainer(job), course(job)
        first = restore_checkpoint(trainer.engine, schedule, store, folder)
        losses = run_steps(bench, job, trainer, schedule, first)
        state = dict(trainer.tensors(trainer.model, torch.float32))
        weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
        found[name] = {"first": first, "losses": losses, "weights": weights, "kept": store.keys(f"{folder}/checkpoints")}
        trainer.engine.destroy()
    return found


def test_a_bucket_keeps_checkpoints_like_a_directory(bench: Bench, tmp_path: Path) -> None:
    root = bench.store.root.parent
    with s3_server(tmp_path / "log") as server:
        args = (bench, server.environment | {"TMPDIR": str(tmp_path)}, f"s3://{BUCKET}/checkpoints")
        same = run_on_ranks(2, root, through_the_bucket, *args, True)
        names = server.names()
        moved = run_on_ranks(1, root, through_the_bucket, *args, False)
    for found, kept in ((same, []), (moved, ["universal-step-000003"])):
        assert found["bucket"] == found["directory"]
        assert found["bucket"]["first"] == 3
        assert found["bucket"]["kept"] == ["step-000002", "step-000003", *kept]
    assert same["bucket"]["weights"] != moved["bucket"]["weights"], "another number of ranks rounds otherwise"
    assert not [name for name in names if "step-000001" in name], "and the oldest is dropped with all its files"
    assert [path for path in tmp_path.rglob("*.pt")] == [], "no copy stays on the node"


def reads_of_a_resume(bench: Bench, environment: dict[str, str], address: str | None) -> dict[str, Any]:
    """By rank: names of the files of a checkpoint that are hashed, loaded and downloaded when its ranks resume from it.

    Two ranks are on a node, as far as node folders tell.
    """
    from orchestrator.store import local
    from orchestrator.store.bucket import Bucket
    from orchestrator.store.files import open_store
    from orchestrator.student.checkpoint import restore_checkpoint, save_checkpoint
    from orchestrator.student.trainer import start_trainer

    rank, world = dist.get_rank(), dist.get_world_size()
    if address:
        node = Path(environment["TMPDIR"]) / str(rank // 2)
        node.mkdir(exist_ok=True)
        os.environ |= environment | {"TMPDIR": str(node)}
        tempfile.tempdir = None  # where the one before may be remembered
    store, job = open_store(address or str(bench.store.root)), bench.job(Case("sampled", 2), world)
    trainer = start_trainer(job)
    save_checkpoint(trainer.engine, course(job), store, "counted", 1)
    trainer.engine.destroy()
    trainer = start_trainer(job)
    hashed, loaded, downloaded = list[str](), list[str](), list[str]()
    engine, real_hash, real_download = trainer.engine.checkpoint_engine, local.sha256_of, Bucket.download
    real_load = engine.load

    def load(path: str, *args: Any) -> Any:
        loaded.append(Path(path).name)
        return real_load(path, *args)

    def download(bucket: Bucket, objects: Any) -> None:
        objects = list(objects)
        downloaded.extend(name.rpartition("/")[2] for name, _, _ in objects)
        real_download(bucket, objects)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "sha256_of", lambda path: hashed.append(path.name) or real_hash(path))
        patch.setattr(engine, "load", load)
        patch.setattr(Bucket, "download", download)
        assert restore_checkpoint(trainer.engine, course(job), store, "counted") == 1
    trainer.engine.destroy()
    found: list[Any] = [None] * world
    dist.all_gather_object(found, {"hashed": hashed, "loaded": sorted(set(loaded)), "downloaded": sorted(downloaded)})
    return {"ranks": found, "files": [name for name in store.contents("counted/checkpoints/step-000001") or {}]}


MODEL_FILE = "mp_rank_00_model_states.pt"


def optimizer_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_a_resume_hashes_each_file_once_over_all_ranks(bench: Bench) -> None:
    found = run_on_ranks(4, bench.store.root.parent, reads_of_a_resume, bench, {}, None)
    names = [MODEL_FILE, *map(optimizer_file, range(4))]
    assert sorted(Path(name).name for name in found["files"]) == ["manifest.json", *names]
    assert sorted(name for rank in found["ranks"] for name in rank["hashed"]) == names
    for rank, reads in enumerate(found["ranks"]):
        assert reads["hashed"] == sorted([optimizer_file(rank), *([MODEL_FILE] if rank == 0 else [])]), "what it wrote"
        assert reads["loaded"] == [MODEL_FILE, optimizer_file(rank)], "what it needs"


def test_a_node_downloads_what_its_ranks_need(bench: Bench, tmp_path: Path) -> None:
    with s3_server(tmp_path / "log") as server:
        environment = server.environment | {"TMPDIR": str(tmp_path)}
        found = run_on_ranks(4, tmp_path, reads_of_a_resume, bench, environment, f"s3://{BUCKET}/reads")
    for node in (0, 1):
        ranks = found["ranks"][2 * node : 2 * node + 2]
        needed = [MODEL_FILE, optimizer_file(2 * node), optimizer_file(2 * node + 1)]
        assert sorted(name for rank in ranks for name in rank["downloaded"]) == needed, "each file once a node"
    assert [path for path in tmp_path.rglob("*.pt")] == [], "no copy stays on a node"
