"""How many trials, from which seed, and the undisturbed run that all of them are compared with."""

from __future__ import annotations

import pytest

from tests.tiny import Reference, make_reference

TRIALS, SHARD_TRIALS, SEED = 3, 1, 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--trials", type=int, help=f"Runs to disturb in each test; {TRIALS} and {SHARD_TRIALS} (shards) by default."
    )
    parser.addoption("--fault-seed", type=int, default=SEED, help="Decides what is killed and when.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, trials in {"trial": TRIALS, "shard_trial": SHARD_TRIALS}.items():
        if name in metafunc.fixturenames:  # the options exist only where pytest is pointed at this folder
            count = metafunc.config.getoption("--trials", None) or trials
            metafunc.parametrize(name, range(count))


@pytest.fixture(scope="session")
def fault_seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--fault-seed", SEED)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"))
