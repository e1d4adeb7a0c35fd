"""What unit tests share: an empty label log."""

from __future__ import annotations

import pytest

from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from tests.label_logs import IDENTITY


@pytest.fixture
def log(store: LocalStore) -> LabelLog:
    return LabelLog.open(store, IDENTITY)
