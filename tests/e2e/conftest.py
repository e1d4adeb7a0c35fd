"""The undisturbed run in a directory of this machine that others are compared with."""

from __future__ import annotations

import pytest

from tests.tiny import Reference, make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"))
