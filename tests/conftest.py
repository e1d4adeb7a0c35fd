"""What all tests share: one printed seed, one computing thread a process, a small corpus and its tokens."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import secrets
import signal
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import pytest
from hypothesis import HealthCheck, settings

from orchestrator.spec.data import Data, TextSource, TrainTokenizer
from orchestrator.store.label_log import LabelLog
from orchestrator.store.local import LocalStore
from orchestrator.store.records import TokenManifest
from tests.label_logs import IDENTITY

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job, and then in all it starts

SEED = int(os.environ.setdefault("DISTILL_TEST_SEED", str(secrets.randbelow(2**31))))
"""The same in all processes that share out the tests: they inherit it."""

settings.register_profile(
    "shared", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("shared")


TESTS = Path(__file__).parent
DEEP = {"parity", "faults", "e2e"}
"""Layers that take minutes: `make test` runs what they mark as `slice`, `make check` the rest."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in DEEP and not item.get_closest_marker("slice"):
            item.add_marker("deep")


def pytest_report_header() -> str:
    return f"DISTILL_TEST_SEED={SEED}"


@pytest.fixture
def seed() -> int:
    """The seed of this session; pytest shows it with every failure."""
    print(f"DISTILL_TEST_SEED={SEED}")
    return SEED


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def log(store: LocalStore) -> LabelLog:
    """An empty label log."""
    return LabelLog.open(store, IDENTITY)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files: a few pages of the Python manual, which every interpreter carries."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in sorted(topics.topics)[:40]:
        (folder / f"{name}.txt").write_text(f"{name}\n{topics.topics[name][:3000]}", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class TokenizedCorpus:
    store: LocalStore
    folder: str
    data: Data
    manifest: TokenManifest


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> TokenizedCorpus:
    """The corpus as token shards, packed in this process without a cluster. Read it, do not change it."""
    from orchestrator.data.pack import pack_piece
    from orchestrator.data.prepare import Corpus, token_manifest
    from orchestrator.data.sources import list_pieces
    from orchestrator.data.tokenizer import tokenizer_facts, train_tokenizer

    store, folder = LocalStore(tmp_path_factory.mktemp("tokenized")), "data/corpus"
    tokenizer = TrainTokenizer(vocab_size=400)
    source = TextSource(kind="text", paths=(f"{corpus}/*.txt",))
    data = Data(source=source, tokenizer=tokenizer, seq_len=32, rows_per_shard=16, heldout_fraction=0.2)
    pieces = list_pieces(data)
    with store.folder_for(f"{folder}/tokenizer") as built:
        train_tokenizer(data, tokenizer, pieces, built)
    facts = tokenizer_facts(store.path(f"{folder}/tokenizer"))
    packed = [pack_piece(store, folder, data, piece, facts) for piece in pieces]
    manifest = token_manifest(store, Corpus("corpus", data, None), facts, packed)
    manifest.save(store, f"{folder}/manifest.json")
    return TokenizedCorpus(store, folder, data, manifest)
