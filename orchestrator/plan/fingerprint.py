"""Identity by content: what goes in decides the name of what comes out."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from orchestrator.spec.base import Spec, result_fields

FINGERPRINT_HEX = 32


def canonical(value: Any) -> str:
    """One JSON text per value: sorted keys, no spaces, sections of a job as their fields that can change a result."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_model_fields, allow_nan=False)


def fingerprint(stage: str, *inputs: Any) -> str:
    """Hex name of what `stage` makes of `inputs`: a SHA-256 over everything that can change its result."""
    return hashlib.sha256(canonical([stage, *inputs]).encode()).hexdigest()[:FINGERPRINT_HEX]


def _model_fields(value: Any) -> Any:
    if isinstance(value, Spec):
        return result_fields(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"not part of a fingerprint: {type(value).__name__}")
