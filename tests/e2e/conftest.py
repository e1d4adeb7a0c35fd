"""The undisturbed run in a directory of this machine that others are compared with."""

from __future__ import annotations

import pytest

from tests.tiny import Reference, make_reference


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clean-install", action="store_true", help="Install the wheel with all that it depends on.")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"))
