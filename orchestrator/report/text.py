"""Sample text as the page shows it: every token with a shade for how far student and teacher were apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report.words import nats, percent, visible

_FARTHEST = 8


def shown(sample: Sequence[Mapping[str, Any]], quantiles: Mapping[str, float]) -> dict[str, Any]:
    """The tokens of `sample` as the page's template takes them, and those among them on which the models differ most.

    A shade is the number of `quantiles` of the student's KL over all held-out tokens that a token lies above.
    """
    tokens = [_token(token, sum(token["kl_nats"] > q for q in quantiles.values())) for token in sample]
    farthest = sorted(range(len(sample)), key=lambda i: -sample[i]["kl_nats"])[:_FARTHEST]
    return {"tokens": tokens, "farthest": [tokens[i] for i in farthest]}


def _token(token: Mapping[str, Any], shade: int) -> dict[str, Any]:
    lines = [visible(line) for line in token["text"].split("\n")]
    return {
        "text": "↵\n".join(lines) or "·",
        "name": _quoted(token["text"]),
        "shade": shade,
        "kl": nats(token["kl_nats"]),
        **{model: percent(token[model]) for model in ("teacher", "student")},
        **{
            top: [(_quoted(guess["text"]), percent(guess["probability"])) for guess in token[top]]
            for top in ("teacher_top", "student_top")
        },
    }


def _quoted(text: str) -> str:
    return f"“{visible(text)}”"
