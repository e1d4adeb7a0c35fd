"""What a user does with an export: plain transformers in a process of its own, which knows nothing of who made it.

`python generate.py FOLDER...` prints a line of JSON for each: what it makes of the ids in FOLDER.pt, where it stops, and how it
uses its cache; of the first, how long it takes with and without.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, LONGEST, TIMED = "def read(", 40, 400
CHOICES: tuple[dict[str, Any], ...] = ({}, {"use_cache": False})
"""As the export says, and without a cache."""


class Export:
    def __init__(self, folder: Path) -> None:
        self._model, self._tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self._trained = torch.load(folder.with_suffix(".pt"))
        self._prompt = self._tokenizer(PROMPT, return_tensors="pt")
        self._widths: list[int] = []
        self._model.register_forward_pre_hook(
            lambda _, args, given: self._widths.append(given["input_ids"].shape[1]), with_kwargs=True
        )

    def outcome(self) -> dict[str, Any]:
        with torch.no_grad():
            logits = self._model(input_ids=self._trained["ids"]).logits
        found = self._text(max_new_tokens=LONGEST)
        long = [self._text(max_new_tokens=LONGEST, min_new_tokens=LONGEST, **choice) for choice in CHOICES]
        return {
            "off": float((logits - self._trained["logits"]).abs().max()),
            "moved": float((self._trained["logits"] - self._trained["first"]).abs().max()),
            "tokens": found[0],
            "text": self._tokenizer.decode(found[0], skip_special_tokens=True),
            "end": self._tokenizer.eos_token_id,
            "widths": [widths for _, widths in long],
            "same_without_cache": long[0][0] == long[1][0],
        }

    def seconds(self) -> list[float]:
        """Of this process, for `TIMED` tokens, for each of `CHOICES`."""
        taken: list[float] = []
        for choice in CHOICES:
            started = time.process_time()
            self._text(max_new_tokens=TIMED, min_new_tokens=TIMED, **choice)
            taken.append(time.process_time() - started)
        return taken

    def _text(self, **settings: Any) -> tuple[list[int], list[int]]:
        """The ids, and how many of them each forward pass was given."""
        self._widths.clear()
        ids = self._model.generate(**self._prompt, do_sample=False, **settings)[0].tolist()
        return ids, [*self._widths]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        export = Export(Path(name))
        timed = {"seconds": export.seconds()} if name == sys.argv[1] else {}
        print(json.dumps(export.outcome() | timed | {"name": Path(name).name}), flush=True)
    assert {name.split(".")[0] for name in sys.modules}.isdisjoint({"orchestrator", "deepspeed", "ray"})
