"""Students of every kind, trained as a training worker trains them until they know where a document ends, and exported."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from orchestrator.export.folder import export_model
from orchestrator.export.release import Release
from orchestrator.losses.schedule import ObjectiveSchedule
from orchestrator.models.tokenizer import copy_tokenizer
from orchestrator.spec.job import Job
from orchestrator.spec.model import ConfigStudent, Model
from orchestrator.spec.train import Train
from orchestrator.store.local import LocalStore
from orchestrator.store.records import ModelFolder, ModelManifest, TokenManifest, Tokens, finished_model
from orchestrator.store.shard_pages import paged
from orchestrator.store.shards import TokenShard, put_tokens
from orchestrator.student.job import Ahead, Initial, TrainingJob
from tests.field.cases import LLAMA, SHAPE, VOCAB, save_model, save_tokenizer
from tests.tiny import Json

SEQ, ROWS, STEPS = 32, 64, 60
DOCUMENTS = ["def read(file):", "def write(file, text):", "import json", "class Reader:", "return None"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK = SHAPE | LATENT | ROUTED | {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
GENERATION: Json = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "eos_token_id": [1, 0],
    "max_length": 100_000,
    "cache_implementation": "hybrid",
    "transformers_version": "4.40.0",
}
"""The teacher's: it may end with <s>, id 1, as well."""
TEACHER: Json = {"pad_token_id": 0, "eos_token_id": 2, "use_cache": False, "tie_word_embeddings": False}
"""It pads with the end of text, whose row is therefore zero, and names an end that its tokenizer does not."""
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>bot:{% endif %}"
)
CARD = "---\nlicense: apache-2.0\ntags: [x]\n---\n# A teacher\n"

STUDENTS: dict[str, Json] = {
    "own-tokenizer": {"kind": "config", "model": {"type": "llama", "config": SHAPE}},
    "teachers-tokenizer": {"kind": "config", "model": {"type": "qwen3", "config": SHAPE | {"head_dim": 16}}},
    "gpt2": {"kind": "config", "model": {"type": "gpt2", "config": {"n_embd": 64, "n_layer": 2, "n_head": 4}}},
    "deepseek": {"kind": "config", "model": {"type": "deepseek_v3", "config": DEEPSEEK}},
    "mixture": {"kind": "config", "model": {"type": "mixtral", "config": SHAPE | EXPERTS}},
    "mtp": {"kind": "config", "mtp_depth": 1, "model": {"type": "llama", "config": SHAPE}},
    "checkpoint": {"kind": "checkpoint"},
    "pruned": {"kind": "pruned", "layers": 1, "intermediate_size": 96},
    "upcycled": {"kind": "upcycled", "experts": 4},
}


@dataclass(frozen=True)
class Workshop:
    """A teacher as it is downloaded, its tokenizer with and without it, and token shards of very short documents."""

    root: Path
    manifest: TokenManifest

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.root / "store")

    @property
    def teacher(self) -> ModelFolder:
        return ModelFolder(str(self.root / "teacher"), ModelManifest(fingerprint="x", files={}, vocab_size=VOCAB))

    def job(self, name: str) -> TrainingJob:
        student = STUDENTS[name]
        train = Train(steps=STEPS, global_batch=16, micro_batch=16, warmup_steps=4, precision="fp32", learning_rate=1e-2)
        model = Model(**student["model"]) if student["kind"] == "config" else self.initial(name)
        plain = TrainingJob(name, model, VOCAB, train, 0, self.data(name), self.manifest, soft=None)
        return replace(plain, ahead=Ahead(1, 0.3)) if student.get("mtp_depth") else plain

    def data(self, name: str) -> str:
        return "data/own" if name == "own-tokenizer" else "data/teachers"

    def initial(self, name: str) -> Initial:
        from orchestrator.store.interface import unguarded
        from orchestrator.student.initial import Origin, _make_task

        student = self.spec(name).student
        assert not isinstance(student, ConfigStudent)
        origin = Origin(self.store, student, self.teacher, 0, "data/own/train", self.manifest)
        if not self.store.exists(f"{origin.stage}/model"):
            _make_task._function(origin, unguarded)
        return Initial(folder=self.store.address(f"{origin.stage}/model"), content=origin.key)

    def spec(self, name: str) -> Job:
        """The job that a user would have written for the student `name`."""
        teacher: Json = {"kind": "transformers", "path": str(self.root / "teacher")}
        sections: Json = {"data": {"seq_len": SEQ, "tokenizer": {"kind": "teacher"}}, "teacher": teacher}
        if name == "own-tokenizer":
            sections = {"data": {"seq_len": SEQ}}
        brought = {"path": str(self.root / "checkpoint")} if name in ("checkpoint", "upcycled") else {}
        return Job.model_validate_json(json.dumps(sections | {"name": name, "student": STUDENTS[name] | brought}))


def build_workshop(root: Path) -> Workshop:
    store = LocalStore(root / "store")
    teacher = save_model(root / "teacher", config=LLAMA | TEACHER)
    (teacher / "generation_config.json").write_text(json.dumps(GENERATION))
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    (teacher / "README.md").write_text(CARD)
    (teacher / "original").mkdir()
    for junk in ("original/consolidated.00.pth", "optimizer.pt", "training_args.bin"):
        (teacher / junk).write_bytes(b"junk")
    shutil.copytree(teacher, root / "checkpoint")
    with store.folder_for("data/own/tokenizer") as folder:
        save_tokenizer(folder)
    with store.folder_for("data/teachers/tokenizer") as folder:
        copy_tokenizer(teacher, folder)
    tokenizer, draw = AutoTokenizer.from_pretrained(teacher), random.Random(0)
    stream: list[int] = []
    while len(stream) < ROWS * (SEQ + 1):
        stream += [*tokenizer(draw.choice(DOCUMENTS)).input_ids, tokenizer.eos_token_id]
    ids = np.array(stream[: ROWS * (SEQ + 1)], dtype=np.int32).reshape(ROWS, SEQ + 1)
    shard = TokenShard([draw.randbytes(16) for _ in ids], ids)
    pages = [
        paged(store, folder, [put_tokens(store, folder, 0, shard, 16)]) for folder in ("data/own/train", "data/teachers/train")
    ]
    return Workshop(root, TokenManifest.without_corpus(SEQ, VOCAB, pages[0]))


def train_all(workshop: Workshop) -> list[str]:
    """Train every kind of student; beside each export-to-be lies a file with what the trained model makes of some ids."""
    from orchestrator.student.feed import Feed
    from orchestrator.student.trainer import start_trainer
    from orchestrator.student.worker import save_model, train_step

    ids = torch.arange(24).reshape(2, 12) % VOCAB
    for name in STUDENTS:
        job = workshop.job(name)
        trainer, schedule = start_trainer(job), ObjectiveSchedule(job.objective, STEPS, torch.device("cpu"))
        first = logits(trainer.model, ids)
        feed = Feed(workshop.store, job, trainer.data_rank, lambda: None, labels=trainer.reads_labels)
        for step, micro_batches in feed.steps(0):
            train_step(trainer, job, schedule, step, micro_batches)
        save_model(trainer, workshop.store, job, f"{workshop.data(name)}/tokenizer", {"steps": STEPS})
        (workshop.root / "exports").mkdir(exist_ok=True)
        trained = {"ids": ids, "first": first, "logits": logits(trainer.model, ids)}
        torch.save(trained, workshop.root / "exports" / f"{name}.pt")
        trainer.engine.destroy()
    return list(STUDENTS)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    made = model(input_ids=ids, use_cache=False).logits
    model.train()
    return made


def export_all(workshop: Workshop) -> Iterator[tuple[str, Path]]:
    for name in STUDENTS:
        student = finished_model(workshop.store, workshop.job(name).folder)
        assert student is not None
        figures = {"params": 1000, "heldout_ce_nats": 2.0, "heldout_ppl": 7.39, "top1_accuracy": 0.5}
        measured = None if name == "gpt2" else figures  # a teacher that could not be measured
        report = {"name": name, "teacher": measured, "student": figures, "baseline": None, "gap_recovered": None}
        report["labels"] = {"kind": "sampled", "bytes_per_token": 33.0}
        tokens = Tokens(workshop.data(name), workshop.manifest)
        folder = workshop.root / "exports" / name
        export_model(
            Release(workshop.spec(name), workshop.store, tokens, workshop.teacher, student, report), str(folder), {"run": name}
        )
        yield name, folder
