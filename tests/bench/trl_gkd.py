"""The same steps by TRL's GKDTrainer: forward KL on given rows, nothing sampled from the student. Needs TRL's environment.

python -P trl_gkd.py CASE medium|bf16 STEPS BATCH RATE      (-P: `trl` is the package, not the script beside this one)
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

WARM = 2


class Clock(TrainerCallback):
    """Starts after the warm-up steps and stops with the last one; keeps every step's loss."""

    def __init__(self) -> None:
        self.cpu, self.wall = 0.0, 0.0
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM:
            self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        elif state.global_step == state.max_steps:
            self.cpu += time.process_time()
            self.wall += time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class InFileOrder(GKDTrainer):
    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows without padding; every token but the first is learnt."""
    tokens = torch.tensor([item["tokens"] for item in items])
    labels = tokens.clone()
    labels[:, 0] = -100
    mask = torch.ones_like(tokens)
    prompts = {"prompts": tokens[:, :1], "prompt_attention_mask": mask[:, :1]}
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, **prompts}


def config(folder: str, seq: int, bf16: bool, steps: int, batch: int, rate: float) -> GKDConfig:
    return GKDConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=WARM + steps,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        seq_kd=False,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        learning_rate=rate,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        max_length=seq,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )


def train(case: Path, bf16: bool, steps: int, batch: int, rate: float) -> dict[str, Any]:
    rows = np.load(case / "tokens.npy")[: (WARM + steps) * batch]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InFileOrder(
            model=AutoModelForCausalLM.from_pretrained(case / "student", dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(
                case / "teacher", dtype=torch.bfloat16 if bf16 else torch.float32
            ),
            args=config(folder, rows.shape[1], bf16, steps, batch, rate),
            train_dataset=Dataset.from_list([{"tokens": row.tolist()} for row in rows]),
            data_collator=collate,
            processing_class=AutoTokenizer.from_pretrained(case / "student"),
            callbacks=[clock],
        )
        trainer.train()
    tokens = steps * batch * rows.shape[1]
    return {"tokens_per_cpu_s": tokens / clock.cpu, "tokens_per_s": tokens / clock.wall, "losses": clock.losses}


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    case, precision, steps, batch, rate = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    result = train(Path(case), precision == "bf16", int(steps), int(batch), float(rate))
    print(json.dumps({**result, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
