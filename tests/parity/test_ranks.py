"""Training on 1, 2 and 4 ranks under every ZeRO stage against one plain loop in float64, and its checkpoints.

All trainings of a world size run in one group of processes, started once; the tests look at what they left behind.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orchestrator.labels.answer import Answer
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame
from orchestrator.labels.targets import Dense
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import build_model
from orchestrator.plan.order import TrainingOrder
from orchestrator.runtime.environment import limit_threads, prepare_deepspeed
from orchestrator.spec.labels import DenseLabels, Feature, Features, Labels, SampledLabels, TopkLabels
from orchestrator.spec.model import Model
from orchestrator.spec.objective import MinilmTerm, Objective, Schedule, Taid
from orchestrator.spec.train import Train, Zero
from orchestrator.store.files import Store
from orchestrator.store.label_log import LabelLog
from orchestrator.store.records import MANIFEST, FileRecord, TokenManifest, describe_folder
from orchestrator.store.shards import TokenShard, put_shard, read_tokens
from orchestrator.student.job import Soft, TrainingJob

VOCAB, SEQ, STEPS, ROWS = 128, 16, 5, 8
SHARD_ROWS = [7, 5, 8, 6, 4, 6]
"""36 rows an epoch: the last of the five steps begins the second one."""
SEED = 11
PATIENCE_S = 400.0

LOSSES = {"fp32": 2e-6, "bf16": 2e-4}
"""How far losses may be from float64, relative; bf16 has 8 bits of mantissa."""
WEIGHTS = {"fp32": 1e-4, "bf16": 0.15}
"""How far the final weights may be from those of float64, as a share of the way they came."""

KEPT = Feature(layer=2, part="values")
TEACHER_WIDTH, RELATION_HEADS, RELATION_WEIGHT = 24, 2, 0.5
LABELS: dict[str, tuple[Labels, Objective]] = {
    "sampled": (SampledLabels(samples=20), Objective(alpha=0.3)),
    "topk": (TopkLabels(kind="topk", k=6, temperatures=(1.0, 2.0)), Objective(alpha=0.2, temperature=2.0)),
    "shifted": (SampledLabels(samples=20), Objective(alpha=0.3)),
    "relations": (
        SampledLabels(samples=20, features=Features(keep=(KEPT,))),
        Objective(alpha=0.3, features=(MinilmTerm(kind="minilm", weight=RELATION_WEIGHT, heads=RELATION_HEADS),)),
    ),
    "taid": (DenseLabels(kind="dense", dtype="fp32"), Objective(alpha=Schedule(start=0.6, end=0.1), taid=Taid(rate=0.2))),
}


Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One training: `labels` is a key of `LABELS`, or `hard`."""

    labels: str
    zero: int
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.labels}-zero{self.zero}-{self.precision}"


CASES: dict[int, list[Case]] = {
    1: [Case("sampled", 0), Case("topk", 3), Case("hard", 1), Case("shifted", 1), Case("taid", 1), Case("sampled", 2, "bf16")],
    2: [
        *(Case(labels, zero) for labels in ("sampled", "topk") for zero in range(4)),
        *(Case("sampled", zero, "bf16") for zero in (1, 2, 3)),
        Case("taid", 3),
        *(Case("relations", zero) for zero in (1, 3)),
    ],
    4: [Case("sampled", 0), Case("topk", 1), Case("sampled", 3)],
}
RESUMED: dict[int, list[Case]] = {
    1: [Case("sampled", 0), Case("sampled", 2, "bf16"), Case("topk", 3), Case("taid", 1)],
    2: [case for case in CASES[2] if case.labels == "sampled"],
}


# The storage: token shards and label logs, as the stages before would leave them.


@dataclass(frozen=True)
class Bench:
    store: Store
    manifest: TokenManifest
    logs: dict[str, str]

    def job(self, case: Case, world: int, stage: str = "student") -> TrainingJob:
        soft = None
        if case.labels != "hard":
            soft = Soft(self.logs[case.labels], *LABELS[case.labels], teacher=self.store.path("teacher"), teacher_dtype="fp32")
        train = Train(
            steps=STEPS,
            global_batch=ROWS,
            micro_batch=2,
            learning_rate=2e-3,
            warmup_steps=2,
            weight_decay=0.1,
            grad_clip=0.2,
            precision=case.precision,  # type: ignore[arg-type]
            parallel=Zero(stage=case.zero),  # type: ignore[arg-type]
            workers=world,
        )
        return TrainingJob(stage, model_of(case), VOCAB, train, SEED, "data/x", self.manifest, soft)


def model_of(case: Case) -> Model:
    config: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Model(type="llama", config=config | {"num_key_value_heads": 2, "tie_word_embeddings": case.labels != "topk"})


def build_bench(root: Path) -> Bench:
    store, rng = Store(root / "store"), np.random.default_rng(5)
    records, shards = [], []
    for shard, rows in enumerate(SHARD_ROWS):
        tokens = TokenShard([rng.bytes(16) for _ in range(rows)], rng.integers(0, VOCAB, (rows, SEQ + 1), dtype=np.int32))
        records.append(put_shard(store, "data/x/train", shard, tokens.to_table()))
        shards.append(tokens)
    totals = {"documents": 1, "heldout_documents": 0, "skipped_documents": 0, "dropped_tokens": 0}
    manifest = TokenManifest(
        fingerprint="x", seq_len=SEQ, vocab_size=VOCAB, tokenizer_sha256="", train=tuple(records), heldout=(), **totals
    )
    store.path("data/x/tokenizer").mkdir()
    shape = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    build_model(Model(config=shape | {"num_key_value_heads": 2}), VOCAB, 1, "teacher").save_pretrained(store.path("teacher"))
    return Bench(store, manifest, {name: write_log(store, name, labels, shards) for name, (labels, _) in LABELS.items()})


def write_log(store: Store, name: str, labels: Labels, shards: list[TokenShard]) -> str:
    """Labels of a teacher that is sure of a few ids, other ones at every position."""
    log, codec = LabelLog.open(store, {"name": name}), Codec(labels, Frame(VOCAB, SEQ))
    for shard, tokens in enumerate(shards):
        generator = torch.Generator().manual_seed(shard)
        logits = torch.randn(len(tokens.row_ids), SEQ, VOCAB, generator=generator) * 3
        inner = torch.randn(len(tokens.row_ids), SEQ, TEACHER_WIDTH, generator=generator)
        if name == "shifted":
            logits = logits.roll(1, 1)
        answer = replace(Answer.of_logits(logits), features={KEPT.name: inner})
        log.commit(shard, tokens, codec.pack(codec.extract(answer, tokens.row_ids)))
    return log.key


# The reference: one process, float64, dense targets, AdamW written out.


def dense_loss(
    bench: Bench, job: TrainingJob, model: torch.nn.Module, rows: list[tuple[int, int]], step: int = 0, share: float = 1.0
) -> list[torch.Tensor]:
    """Mean (loss, CE, KL, features' loss) over the rows of a batch; `share` is the teacher's in an interpolated target."""
    ids = np.stack([read_tokens(bench.store, "data/x/train", bench.manifest.train[s]).ids[r] for s, r in rows])
    tokens = torch.from_numpy(ids).long()
    values: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *args: values.append(args[2]))  # type: ignore
    log_q = model(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    hook.remove()
    ce = -log_q.gather(2, tokens[:, 1:, None]).mean()
    if job.soft is None:
        return [ce, ce, torch.zeros(()), torch.zeros(())]
    objective = job.soft.objective
    inner = torch.zeros((), dtype=torch.float64)
    if objective.features:
        inner = RELATION_WEIGHT * relation_kl(stored_features(bench, job, rows), values[0])
    targets, kept, tail = dense_targets(bench, job, rows)
    alpha, temperature = objective.alpha, objective.temperature
    assert not isinstance(temperature, Schedule)
    if isinstance(alpha, Schedule):
        alpha = alpha.start + (alpha.end - alpha.start) * step / (STEPS - 1)
    if objective.taid is not None:
        targets = (log_q.detach() * (1 - share) + targets.log() * share).softmax(-1)
    log_q = (log_q / temperature).log_softmax(-1)
    kl = (torch.xlogy(targets, targets) - targets * log_q).sum(-1)
    if tail is not None:
        rest = (log_q.exp() * ~kept).sum(-1)
        kl = kl + torch.xlogy(tail, tail) - tail * rest.log()
    return [alpha * ce + (1 - alpha) * temperature**2 * kl.mean() + inner, ce, kl.mean(), inner]


def stored_features(bench: Bench, job: TrainingJob, rows: list[tuple[int, int]]) -> torch.Tensor:
    """[rows, seq, teacher's width], fp16 as they were stored."""
    assert job.soft is not None
    log, found = LabelLog(bench.store, job.soft.log_key), []
    for shard, row in rows:
        tokens = read_tokens(bench.store, "data/x/train", bench.manifest.train[shard])
        record = log.committed(shard)
        assert record is not None
        raw = log.read(shard, record, tokens)[KEPT.name][row]
        found.append(np.frombuffer(raw, dtype="<f2").reshape(SEQ, TEACHER_WIDTH).astype(np.float64))
    return torch.from_numpy(np.stack(found))


def relation_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """MiniLMv2's loss, position by position: what each gives to those up to itself, in every relation head."""
    total = torch.zeros((), dtype=torch.float64)
    for t, s in zip(teacher, student, strict=True):
        for h in range(RELATION_HEADS):
            a, b = (x.chunk(RELATION_HEADS, -1)[h] for x in (t, s))
            for i in range(SEQ):
                p, q = ((x[: i + 1] @ x[i] / math.sqrt(x.shape[1])).softmax(0) for x in (a, b))
                total = total + (p * (p / q).log()).sum()
    return total / (len(teacher) * RELATION_HEADS * SEQ)


def dense_targets(
    bench: Bench, job: TrainingJob, rows: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Probabilities [rows, seq, vocab], which ids the teacher named [rows, seq, vocab], mass of the others [rows, seq]."""
    assert job.soft is not None
    log, codec = LabelLog(bench.store, job.soft.log_key), Codec(job.soft.labels, Frame(VOCAB, SEQ))
    parts = []
    for shard, row in rows:
        tokens = read_tokens(bench.store, "data/x/train", bench.manifest.train[shard])
        record = log.committed(shard)
        assert record is not None
        arrays = {name: values[row : row + 1] for name, values in codec.unpack(log.read(shard, record, tokens)).items()}
        decoded = codec.targets(arrays, job.soft.objective.temperature)  # type: ignore[arg-type]
        if isinstance(decoded, Dense):
            parts.append((decoded.logits[0].double().softmax(-1), torch.ones(SEQ, VOCAB, dtype=torch.bool), None))
            continue
        dense = torch.zeros(SEQ, VOCAB, dtype=torch.float64)
        dense.scatter_add_(1, decoded.ids[0], decoded.probs[0].double())
        kept = torch.zeros(SEQ, VOCAB, dtype=torch.bool).scatter_(1, decoded.ids[0], value=True)
        parts.append((dense, kept, None if decoded.tail is None else decoded.tail[0].double()))
    tails = [tail for _, _, tail in parts if tail is not None]
    return torch.stack([p for p, _, _ in parts]), torch.stack([k for _, k, _ in parts]), torch.stack(tails) if tails else None


def rate(train: Train, step: int) -> float:
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    turn = math.cos(math.pi * (step - train.warmup_steps) / (train.steps - 1 - train.warmup_steps))
    return train.learning_rate * (0.1 + 0.9 * (1 + turn) / 2)


def reference(bench: Bench, job: TrainingJob) -> tuple[list[list[float]], Weights]:
    """(loss, CE, KL, features' loss) of every step and the final weights."""
    train, model = job.train, build_model(job.model, VOCAB, SEED, "student").double()
    order = TrainingOrder(SHARD_ROWS, SEED, ROWS)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses = []
    taid = job.objective.taid or Taid()
    share, mean = taid.start, 0.0
    for step in range(STEPS):
        model.zero_grad()
        terms = dense_loss(bench, job, model, order.batch(step), step, share)
        terms[0].backward()
        losses.append([float(term.detach()) for term in terms])
        if step > 0:
            fall = (losses[-2][2] - losses[-1][2]) / losses[-2][2] if losses[-2][2] else 0.0
            mean = taid.momentum * mean + (1 - taid.momentum) * fall
            share += taid.rate * (1 - share) / (1 + math.exp(-mean))
        share = min(taid.end, max(share, taid.start + (taid.end - taid.start) * (step + 1) / STEPS))
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
        clip = min(1.0, train.grad_clip / norm)
        with torch.no_grad():
            for name, p in model.named_parameters():
                adamw(p, p.grad * clip, moments[name], step + 1, rate(train, step), train)
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def adamw(
    p: torch.Tensor, g: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], t: int, lr: float, train: Train
) -> None:
    (first, second), (b1, b2) = moments, train.betas
    first.mul_(b1).add_(g * (1 - b1))
    second.mul_(b2).add_(g * g * (1 - b2))
    if p.dim() >= 2:
        p.mul_(1 - lr * train.weight_decay)
    p.sub_(lr * (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + 1e-8))


# What runs on every rank.


def rank_main(rank: int, world: int, root: Path, bench: Bench) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    limit_threads(1)
    torch.set_num_threads(1)
    prepare_deepspeed(on_gpu=False)
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous-{world}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for case in CASES[world]:
        results[case.name] = train_through(bench, case, world)
    for case in RESUMED.get(world, []):
        results[f"resumed {case.name}"] = train_resumed(bench, case, world)
    if world == 1:
        results["malice"] = load_malice(bench)
    if world < 4:
        results["damage"] = restore_damaged(bench, world)
    if rank == 0:
        (root / f"results-{world}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def course(job: TrainingJob) -> ObjectiveSchedule:
    return ObjectiveSchedule(job.objective, STEPS, torch.device("cpu"))


def run_steps(
    bench: Bench,
    job: TrainingJob,
    engine: Any,
    schedule: ObjectiveSchedule,
    first: int,
    after: Callable[[int], bool] = lambda _: True,
) -> list[list[float]]:
    """(loss, CE, KL) of the steps from `first` on, until `after`, told the steps done, says stop."""
    from orchestrator.student.feed import Feed
    from orchestrator.student.worker import train_step

    losses = []
    for step, micro_batches in Feed(bench.store, job, dist.get_rank(), dist.get_world_size(), lambda: None).steps(first):
        losses.append(train_step(engine, job, schedule, step, micro_batches).tolist())
        if not after(step + 1):
            break
    return losses


def train_through(bench: Bench, case: Case, world: int) -> dict[str, Any]:
    from orchestrator.student.checkpoint import save_checkpoint
    from orchestrator.student.engine import start_engine
    from orchestrator.student.worker import save_model

    job = bench.job(case, world)
    engine, schedule = start_engine(job), course(job)
    losses = run_steps(bench, job, engine, schedule, 0)
    save_checkpoint(engine, schedule, bench.store, f"through/{world}/{case.name}", STEPS)
    save_model(engine, bench.store, job, "data/x/tokenizer", {})
    engine.destroy()
    return {"losses": losses}


def train_resumed(bench: Bench, case: Case, world: int) -> dict[str, Any]:
    """Train three steps, start anew from the checkpoint, and compare the state at the end with that of an unbroken run."""
    from orchestrator.student.checkpoint import restore_checkpoint, save_checkpoint
    from orchestrator.student.engine import start_engine

    job = bench.job(case, world, "resumed")
    before, losses = interrupted(bench, job, 3)
    engine, schedule = start_engine(job), course(job)
    first = restore_checkpoint(engine, schedule, bench.store, job.folder)
    losses += run_steps(bench, job, engine, schedule, first)
    folder = f"again/{world}/{case.name}"
    save_checkpoint(engine, schedule, bench.store, folder, STEPS)
    engine.destroy()
    checkpoint = f"checkpoints/step-{STEPS:06d}/engine"
    through = bench.store.path(f"through/{world}/{case.name}/{checkpoint}")
    same = same_states(bench.store.path(f"{folder}/{checkpoint}"), through)
    return {"first": first, "losses": losses, "same": same, "same before": same_states(before, through)}


def interrupted(bench: Bench, job: TrainingJob, until: int) -> tuple[Path, list[list[float]]]:
    """Train to step `until` with a checkpoint after each step; the folder of the newest, and the losses."""
    from orchestrator.student.checkpoint import save_checkpoint
    from orchestrator.student.engine import start_engine

    engine, schedule = start_engine(job), course(job)

    def keep(done: int) -> bool:
        save_checkpoint(engine, schedule, bench.store, job.folder, done)
        return done < until

    losses = run_steps(bench, job, engine, schedule, 0, keep)
    engine.destroy()
    return checkpoint_of(bench, job, until) / "engine", losses


def checkpoint_of(bench: Bench, job: TrainingJob, step: int) -> Path:
    return bench.store.path(f"{job.folder}/checkpoints/step-{step:06d}")


def same_states(one: Path, other: Path) -> bool:
    """Every tensor and number in the files of two checkpoints is the same, bit for bit."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    pairs = (
        [torch.load(folder / name, weights_only=False) for folder in (one, other)] for name in names if name.endswith(".pt")
    )
    return all(equal(*pair) for pair in pairs)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "__dict__"):
        return type(one) is type(other) and equal(vars(one), vars(other))
    return bool(one == other)


def restore_damaged(bench: Bench, world: int) -> dict[str, Any]:
    """The step that is resumed from, after one damage after another to the newest checkpoint that is still whole."""
    from orchestrator.student.checkpoint import restore_checkpoint
    from orchestrator.student.engine import start_engine

    job = bench.job(Case("sampled", 2), world, "damaged")
    interrupted(bench, job, 3)
    engine = start_engine(job)
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
            found[name] = restore_checkpoint(engine, course(job), bench.store, job.folder)
        except Exception as error:
            found[name] = repr(error)
    engine.destroy()
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
    document = json.loads((checkpoint / MANIFEST).read_text())
    files: dict[str, FileRecord] = {n: r for n, r in describe_folder(checkpoint).items() if n != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(document | {"files": {n: r.model_dump() for n, r in files.items()}}))


def attempt(bench: Bench, job: TrainingJob, canary: Path) -> dict[str, Any]:
    from orchestrator.student.checkpoint import restore_checkpoint
    from orchestrator.student.engine import start_engine

    engine = start_engine(job)
    try:
        outcome: Any = restore_checkpoint(engine, course(job), bench.store, job.folder)
    except Exception as error:
        outcome = type(error).__name__
    engine.destroy()
    return {"outcome": outcome, "code ran": canary.exists()}


# The tests.


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    print(f"weights and order from seed {SEED}, labels and tokens from fixed seeds")
    return build_bench(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """The heavy imports happen in one process, of which the ranks are forks; a fork of the test process would not be safe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        heavy = ["deepspeed", "orchestrator.student.worker", "transformers.models.llama.modeling_llama"]
        multiprocessing.set_forkserver_preload(heavy)
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def results(bench: Bench) -> Callable[[int], dict[str, Any]]:
    """What the trainings on so many ranks brought; they run when the first test asks."""

    @cache
    def of(world: int) -> dict[str, Any]:
        root = bench.store.root.parent
        started = time.monotonic()
        context = mp.start_processes(rank_main, (world, root, bench), world, join=False, start_method="forkserver")
        assert context is not None
        while not context.join(timeout=1):
            if time.monotonic() - started > PATIENCE_S:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"{world} ranks did not finish in {PATIENCE_S:.0f} s")
        print(f"{world} ranks: {time.monotonic() - started:.0f} s")
        return json.loads((root / f"results-{world}.json").read_text())

    return of


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Callable[[str], tuple[list[list[float]], Weights]]:
    return cache(lambda labels: reference(bench, bench.job(Case(labels, 0), 1)))


def deviation(losses: list[list[float]], expected: list[list[float]]) -> float:
    """Largest relative difference of any loss term of any step; terms that are zero in both do not count."""
    assert len(losses) == len(expected) == STEPS
    return max(
        abs(a - b) / abs(b) for one, other in zip(losses, expected, strict=True) for a, b in zip(one, other, strict=True) if b
    )


def detour(weights: Weights, true: Weights, fresh: Weights) -> float:
    """Distance of `weights` from `true`, as a share of the distance that `true` has come from `fresh`."""
    off = sum(float(((weights[name].double() - true[name]) ** 2).sum()) for name in weights)
    way = sum(float(((fresh[name].double() - true[name]) ** 2).sum()) for name in weights)
    return math.sqrt(off / way)


def trained_weights(bench: Bench, case: Case, world: int) -> Weights:
    from safetensors.torch import load_file

    return load_file(bench.store.path(f"{bench.job(case, world).folder}/model/model.safetensors"))


ALL = [(world, case) for world in CASES for case in CASES[world]]
IDS = [f"{world} ranks {case.name}" for world, case in ALL]


@pytest.mark.parametrize(("world", "case"), ALL, ids=IDS)
def test_losses_and_weights_equal_the_reference(bench: Bench, results: Any, expected: Any, world: int, case: Case) -> None:
    true_losses, true_weights = expected("sampled" if case.labels == "shifted" else case.labels)
    losses, weights = results(world)[case.name]["losses"], trained_weights(bench, case, world)
    fresh = build_model(model_of(case), VOCAB, SEED, "student").state_dict()
    off, around = deviation(losses, true_losses), detour(weights, true_weights, fresh)
    print(f"losses off by {off:.1e}, weights by {around:.1e}")
    if case.labels == "shifted":
        assert off > 10 * LOSSES["bf16"], "labels one position late must be noticed"
        assert around > 2 * WEIGHTS["bf16"]
        return
    assert off < LOSSES[case.precision]
    assert around < WEIGHTS[case.precision]
    assert set(weights) | {"lm_head.weight"} == set(true_weights)
    assert {w.dtype for w in weights.values()} == {torch.float32 if case.precision == "fp32" else torch.bfloat16}


def test_the_reference_trains_and_clips(bench: Bench, expected: Any) -> None:
    """Were it to stand still, everything could equal it."""
    losses, _ = expected("sampled")
    assert max(abs(one[0] / losses[0][0] - 1) for one in losses[1:]) > 10 * LOSSES["bf16"]
    job = bench.job(Case("sampled", 0), 1)
    model = build_model(job.model, VOCAB, SEED, "student").double()
    dense_loss(bench, job, model, job.order.batch(0))[0].backward()
    assert math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters())) > 1.5 * job.train.grad_clip


RESUMES = [(world, case) for world in RESUMED for case in RESUMED[world]]


@pytest.mark.parametrize(("world", "case"), RESUMES, ids=[f"{world} ranks {case.name}" for world, case in RESUMES])
def test_a_resumed_training_ends_bit_for_bit_alike(results: Any, world: int, case: Case) -> None:
    resumed, through = results(world)[f"resumed {case.name}"], results(world)[case.name]
    assert resumed["first"] == 3
    assert resumed["losses"] == through["losses"]
    assert resumed["same"]
    assert not resumed["same before"], "the comparison can tell states apart"


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_checkpoint_is_passed_over(results: Any, world: int) -> None:
    found = results(world)["damage"]
    assert found == {
        "kept": ["step-000002", "step-000003"],
        "none": 3,
        **({"manifest cut": 2} if world == 1 else {}),
        "manifest gone": 2,
        "a byte of the last rank": 0,
        "everything": 0,
    }


def test_a_foreign_pickle_in_a_checkpoint_is_not_run(results: Any) -> None:
    found = results(1)["malice"]
    assert found.pop("honest") == {"outcome": 2, "code ran": False}
    assert len(found) == 2, "the file of the model and that of the optimizer"
    for name, outcomes in found.items():
        assert not outcomes["guarded"]["code ran"], name
        assert isinstance(outcomes["guarded"]["outcome"], str), "refused with an error"
        assert outcomes["unguarded"]["code ran"], "without the guard the same file runs its code"
