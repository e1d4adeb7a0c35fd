"""What a user does with an export: plain transformers in a process of its own, which knows nothing of who made it.

`python generate.py FOLDER...` prints a line of JSON for each: what it made of the ids in FOLDER.pt, where it stopped, and how
long it took with and without its cache.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, LONGEST, TIMED = "def read(", 40, 160


def generated(folder: Path) -> dict[str, Any]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not any(name.split(".")[0] in ("orchestrator", "deepspeed", "ray") for name in sys.modules)
    trained = torch.load(folder.with_suffix(".pt"))
    with torch.no_grad():
        logits = model(input_ids=trained["ids"]).logits
    prompt = tokenizer(PROMPT, return_tensors="pt")
    found = model.generate(**prompt, max_new_tokens=LONGEST, do_sample=False)[0].tolist()
    seconds, texts = [], []
    for choice in ({}, {"use_cache": False}):
        started = time.perf_counter()
        texts.append(model.generate(**prompt, do_sample=False, max_new_tokens=TIMED, min_new_tokens=TIMED, **choice).tolist())
        seconds.append(time.perf_counter() - started)
    return {
        "off": float((logits - trained["logits"]).abs().max()),
        "moved": float((trained["logits"] - trained["first"]).abs().max()),
        "tokens": found,
        "text": tokenizer.decode(found, skip_special_tokens=True),
        "end": tokenizer.eos_token_id,
        "seconds": seconds,
        "same_without_cache": texts[0] == texts[1],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps(generated(Path(name)) | {"name": Path(name).name}), flush=True)
