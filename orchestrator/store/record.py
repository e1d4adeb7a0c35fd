"""Base of all records in the storage: small JSON files that are either complete or absent."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import IntegrityError
from orchestrator.store.interface import Store


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    def save(self, store: Store, key: str) -> None:
        """Write this record under `key`, durably."""
        store.replace(key, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, store: Store, key: str) -> Self | None:
        """The record under `key`, None if there is none; raises `IntegrityError` if it cannot be read."""
        try:
            return cls.model_validate_json(store.read(key))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise IntegrityError(f"{store.address(key)}: not a valid record: {error.errors()[0]['msg']}") from error
