"""How many trials, from which seed, and the undisturbed run that all of them are compared with."""

from __future__ import annotations

import pytest

from tests.tiny import Reference, make_reference

TRIALS, SEED = 3, 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trials", type=int, default=TRIALS, help="Runs to kill; the default has one of each kind.")
    parser.addoption("--fault-seed", type=int, default=SEED, help="Decides what is killed and when.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:  # the options exist only where pytest is pointed at this folder
        metafunc.parametrize("trial", range(metafunc.config.getoption("--trials", TRIALS)))


@pytest.fixture(scope="session")
def fault_seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--fault-seed", SEED)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"))
