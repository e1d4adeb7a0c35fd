"""What the parity tests train, and the same by a plain loop: one process, float64, dense targets, AdamW written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from orchestrator.labels.answer import Answer
from orchestrator.labels.codec import Codec
from orchestrator.labels.layout import Frame, join
from orchestrator.labels.targets import Dense
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.build import build_model
from orchestrator.plan.order import TrainingOrder
from orchestrator.spec.labels import DenseLabels, Feature, Features, Labels, SampledLabels, TopkLabels
from orchestrator.spec.model import Model
from orchestrator.spec.objective import MinilmTerm, Objective, Schedule, Taid
from orchestrator.spec.train import Train
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from orchestrator.store.shard_pages import paged
from orchestrator.store.shards import TokenShard, put_tokens, read_tokens
from orchestrator.student.job import Soft, TrainingJob

VOCAB, SEQ, STEPS, ROWS, MICRO = 128, 16, 5, 8, 2
SHARD_ROWS = [7, 5, 8, 6, 4, 6]
GROUP_ROWS = 2
"""36 rows an epoch: the last of the five steps begins the second one."""
SEED = 11
AUX_WEIGHT = 0.1
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
    """One training: `labels` is a key of `LABELS`, or `hard`; `model` one of `MODELS`, `strategy` one of `STRATEGIES`."""

    labels: str
    zero: int
    precision: str = "fp32"
    strategy: str = "zero"
    model: str = "tied"

    @property
    def kind(self) -> str:
        return STRATEGIES[self.strategy]["kind"]

    @property
    def name(self) -> str:
        return f"{self.labels}-{self.model}-{self.strategy}-zero{self.zero}-{self.precision}"


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Model] = {
    "tied": Model(type="llama", config={**SHAPE, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "untied": Model(type="llama", config={**SHAPE, "num_hidden_layers": 2, "tie_word_embeddings": False}),
    "deep": Model(type="llama", config={**SHAPE, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "deep-untied": Model(type="llama", config={**SHAPE, "num_hidden_layers": 4, "tie_word_embeddings": False}),
    "dropout": Model(type="gpt2", config={"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "experts": Model(type="mixtral", config={**SHAPE, "num_hidden_layers": 2, "num_local_experts": 4}),
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "zero": {"kind": "zero"},
    "offload": {"kind": "zero", "offload": "cpu"},
    "1f1b": {"kind": "pipeline", "stages": 2},
    "dualpipev": {"kind": "pipeline", "stages": 2, "schedule": "dualpipev"},
    "ep2": {"kind": "expert", "size": 2},
}


# The storage: token shards and label logs, as the stages before would leave them.


@dataclass(frozen=True)
class Bench:
    store: LocalStore
    manifest: TokenManifest
    logs: dict[str, str]

    def job(self, case: Case, world: int, stage: str = "student") -> TrainingJob:
        soft = None
        if case.labels != "hard":
            teacher = self.store.address("teacher")
            soft = Soft(self.logs[case.labels], *LABELS[case.labels], teacher=teacher, teacher_dtype="fp32")
        train = Train(
            steps=STEPS,
            global_batch=ROWS,
            micro_batch=MICRO,
            learning_rate=2e-3,
            warmup_steps=2,
            weight_decay=0.1,
            grad_clip=0.2,
            precision=case.precision,  # type: ignore[arg-type]
            parallel=STRATEGIES[case.strategy] | {"stage": case.zero},  # type: ignore[arg-type]
            router_aux_weight=AUX_WEIGHT,
            workers=world,
        )
        return TrainingJob(f"{stage}-{world}", MODELS[case.model], VOCAB, train, SEED, "data/x", self.manifest, soft)


def build_bench(root: Path, vocab: int = VOCAB) -> Bench:
    """Token shards with ids below `vocab`, and the logs of `LABELS` for them."""
    store, rng = LocalStore(root / "store"), np.random.default_rng(5)
    records, shards = [], []
    for shard, rows in enumerate(SHARD_ROWS):
        ids = rng.integers(0, vocab, (rows, SEQ + 1), dtype=np.int32)
        tokens = TokenShard([rng.bytes(16) for _ in range(rows)], ids, rng.random((rows, SEQ)) < 0.7)
        records.append(put_tokens(store, "data/x/train", shard, tokens, GROUP_ROWS))
        shards.append(tokens)
    share = sum(int(shard.loss_mask.sum()) for shard in shards) / (sum(SHARD_ROWS) * SEQ)
    pages = paged(store, "data/x/train", records)
    manifest = TokenManifest.without_corpus(SEQ, VOCAB, pages, target_share=share, group_rows=GROUP_ROWS)
    words = Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(store.path("data/x/tokenizer"))
    shape = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    build_model(Model(config=shape | {"num_key_value_heads": 2}), VOCAB, 1, "teacher").save_pretrained(store.path("teacher"))
    return Bench(store, manifest, {name: write_log(store, name, labels, shards) for name, (labels, _) in LABELS.items()})


def write_log(store: LocalStore, name: str, labels: Labels, shards: list[TokenShard]) -> str:
    """Labels of a teacher that is sure of a few ids, other ones at every position."""
    log, codec = LabelLog.open(store, {"name": name}), Codec(labels, Frame(VOCAB, SEQ))
    for shard, tokens in enumerate(shards):
        generator = torch.Generator().manual_seed(shard)
        logits = torch.randn(len(tokens.row_ids), SEQ, VOCAB, generator=generator) * 3
        inner = torch.randn(len(tokens.row_ids), SEQ, TEACHER_WIDTH, generator=generator)
        if name == "shifted":
            logits = logits.roll(1, 1)
        answer = replace(Answer.of_logits(logits), features={KEPT.name: inner})
        log.commit(shard, tokens, codec.pack_groups(codec.extract(answer, tokens.row_ids), GROUP_ROWS))
    return log.key


# The reference: one process, float64, dense targets, AdamW written out.


def dense_loss(
    bench: Bench, job: TrainingJob, model: torch.nn.Module, rows: list[tuple[int, int]], step: int = 0, share: float = 1.0
) -> list[torch.Tensor]:
    """(loss, CE, KL, features' loss) of a batch, by the target; `share` is the teacher's in an interpolated target.

    A target's weight is one over what a batch has of them on average.
    """
    tokens, mask = token_rows(bench, rows), token_masks(bench, rows)
    weight = mask / (mask.numel() * bench.manifest.target_share)
    values: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *args: values.append(args[2]))  # type: ignore
    log_q = model(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    hook.remove()
    ce = -(log_q.gather(2, tokens[:, 1:, None])[..., 0] * weight).sum()
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
    kl = (kl * weight).sum()
    return [alpha * ce + (1 - alpha) * temperature**2 * kl + inner, ce, kl, inner]


def balance(bench: Bench, model: Any, rows: list[tuple[int, int]]) -> torch.Tensor:
    """The routers' loss, by its formula: mean over micro-batches and layers; 0 for a dense model."""
    if not hasattr(model.config, "num_local_experts"):
        return torch.zeros((), dtype=torch.float64)
    losses = []
    for start in range(0, len(rows), MICRO):
        logits: dict[str, torch.Tensor] = {}
        with routed(model, logits):
            model(input_ids=token_rows(bench, rows[start : start + MICRO])[:, :-1])
        for layer in logits.values():
            probs = layer.softmax(-1)
            k, experts = model.config.num_experts_per_tok, probs.shape[1]
            picked = torch.zeros_like(probs).scatter_(1, probs.topk(k).indices, 1.0)
            losses.append(experts / k * (picked.mean(0) * probs.mean(0)).sum())
    return torch.stack(losses).mean()


@contextmanager
def routed(model: torch.nn.Module, logits: dict[str, torch.Tensor]) -> Iterator[None]:
    """Fill `logits` with those of every router, [tokens, experts]."""
    gates = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    hooks = [
        gate.register_forward_hook(lambda *args, name=name: logits.update({name: args[2][0]})) for name, gate in gates.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def tokens_of(bench: Bench, shard: int) -> TokenShard:
    return read_tokens(bench.store, "data/x/train", bench.manifest.train.record(bench.store, shard))


def token_rows(bench: Bench, rows: list[tuple[int, int]]) -> torch.Tensor:
    ids = np.stack([tokens_of(bench, s).ids[r] for s, r in rows])
    return torch.from_numpy(ids).long()


def token_masks(bench: Bench, rows: list[tuple[int, int]]) -> torch.Tensor:
    masks = [tokens_of(bench, s).loss_mask for s, _ in rows]
    return torch.from_numpy(np.stack([mask[r] for mask, (_, r) in zip(masks, rows, strict=True)])).double()


def stored_features(bench: Bench, job: TrainingJob, rows: list[tuple[int, int]]) -> torch.Tensor:
    """[rows, seq, teacher's width], fp16 as they were stored."""
    assert job.soft is not None
    log, found = LabelLog(bench.store, job.soft.log_key), []
    for shard, row in rows:
        tokens = tokens_of(bench, shard)
        record = log.committed(shard)
        assert record is not None
        raw = [value for group in log.read(shard, record, tokens) for value in group[KEPT.name]][row]
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
        tokens = tokens_of(bench, shard)
        record = log.committed(shard)
        assert record is not None
        arrays = join([codec.unpack(group) for group in log.read(shard, record, tokens)])
        arrays = {name: values[row : row + 1] for name, values in arrays.items()}
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


def reference(bench: Bench, job: TrainingJob, name: str) -> tuple[list[list[float]], Weights]:
    """(loss, CE, KL, features' loss) of every step and the final weights, of the model called `name`."""
    train, model = job.train, build_model(MODELS[name], VOCAB, SEED, "student").double()
    model.set_experts_implementation("eager")  # the default multiplies no float64
    order = TrainingOrder(SHARD_ROWS, GROUP_ROWS, SEED, ROWS, train.steps)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses = []
    taid = job.objective.taid or Taid()
    share, mean = taid.start, 0.0
    for step in range(STEPS):
        model.zero_grad()
        terms = dense_loss(bench, job, model, order.batch(step), step, share)
        (terms[0] + AUX_WEIGHT * balance(bench, model, order.batch(step))).backward()
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


# The steps of the trainer, and how far they may be off.


def course(job: TrainingJob) -> ObjectiveSchedule:
    return ObjectiveSchedule(job.objective, STEPS, torch.device("cpu"))


def run_steps(
    bench: Bench,
    job: TrainingJob,
    trainer: Any,
    schedule: ObjectiveSchedule,
    first: int,
    after: Callable[[int], bool] = lambda _: True,
) -> list[list[float]]:
    """Terms of the loss at the steps from `first` on, until `after`, told the steps done, says stop."""
    from orchestrator.student.feed import Feed
    from orchestrator.student.worker import train_step

    losses = []
    feed = Feed(bench.store, job, trainer.data_rank, lambda: None, labels=trainer.reads_labels)
    for step, micro_batches in feed.steps(first):
        losses.append(train_step(trainer, job, schedule, step, micro_batches).means.tolist()[:4])
        if not after(step + 1):
            break
    return losses


def interrupted(bench: Bench, job: TrainingJob, until: int) -> tuple[Path, list[list[float]]]:
    """Train to step `until` with a checkpoint after each step; the folder of the newest, and the losses."""
    from orchestrator.student.checkpoint import save_checkpoint
    from orchestrator.student.trainer import start_trainer

    trainer, schedule = start_trainer(job), course(job)

    def keep(done: int) -> bool:
        save_checkpoint(trainer.engine, schedule, bench.store, job.folder, done)
        return done < until

    losses = run_steps(bench, job, trainer, schedule, 0, keep)
    trainer.engine.destroy()
    return checkpoint_of(bench, job, until) / "engine", losses


def checkpoint_of(bench: Bench, job: TrainingJob, step: int) -> Path:
    return bench.store.path(f"{job.folder}/checkpoints/step-{step:06d}")


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
