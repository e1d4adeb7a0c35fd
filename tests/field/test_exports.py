"""Every kind of export works as what it is (faults A, B, E, F): it is used as its user would, in a fresh process."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from orchestrator.errors import IntegrityError
from orchestrator.models.generation import check_folder
from tests.field.exports import GENERATION, SEQ, STUDENTS, build_workshop, export_all, train_all
from tests.field.generate import LONGEST
from tests.parity.ranks import run_on_ranks
from tests.tiny import Json

pytestmark = pytest.mark.deep

GENERATE = Path(__file__).with_name("generate.py")
OTHER_END = 77


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind of student."""
    root = tmp_path_factory.mktemp("exports")
    workshop = build_workshop(root)
    run_on_ranks(1, root, train_all, workshop)
    return dict(export_all(workshop))


@pytest.fixture(scope="module")
def outcomes(exports: dict[str, Path]) -> dict[str, Any]:
    """What a fresh process made of each, and of one whose end token is not the tokenizer's."""
    wrong = shutil.copytree(exports["own-tokenizer"], exports["own-tokenizer"].with_name("wrong"))
    shutil.copy(exports["own-tokenizer"].with_suffix(".pt"), wrong.with_suffix(".pt"))
    for name in ("config.json", "generation_config.json"):
        rewrite(wrong / name, eos_token_id=OTHER_END)
    command = [sys.executable, str(GENERATE), *map(str, [*exports.values(), wrong])]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=wrong.parent, env={"OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


def read(file: Path) -> Json:
    return json.loads(file.read_text())


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(read(file) | values))


@pytest.mark.parametrize("name", STUDENTS)
def test_it_is_the_trained_model_and_stops_at_its_end(outcomes: dict[str, Any], name: str) -> None:
    found = outcomes[name]
    assert found["off"] < 1e-5 < 1e-2 < found["moved"], "as trained, not as it began"
    assert found["text"] == "def read(file):"
    assert found["tokens"][-1] == found["end"] == 0


def test_with_another_end_it_would_not_stop(outcomes: dict[str, Any]) -> None:
    """The negative control: these are the weights of `own-tokenizer`."""
    assert outcomes["wrong"]["off"] < 1e-5
    assert len(outcomes["wrong"]["tokens"]) > 2 * len(outcomes["own-tokenizer"]["tokens"])


@pytest.mark.parametrize("name", STUDENTS)
def test_it_uses_its_cache(outcomes: dict[str, Any], name: str) -> None:
    """Fault B."""
    found = outcomes[name]
    cached, without = found["widths"]
    assert set(cached[1:]) == {1} and len(cached) == len(without) == LONGEST
    assert without == [*range(cached[0], cached[0] + LONGEST)]
    assert found["same_without_cache"]


def test_its_cache_makes_it_faster(outcomes: dict[str, Any]) -> None:
    with_cache, without = outcomes["own-tokenizer"]["seconds"]
    assert with_cache < without


@pytest.mark.parametrize("name", STUDENTS)
def test_its_settings_are_the_tokenizers_and_the_teachers(exports: dict[str, Path], name: str) -> None:
    """Fault A."""
    folder = exports[name]
    config, generation = read(folder / "config.json"), read(folder / "generation_config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, None)
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (0, None)
    assert config["use_cache"] is generation["use_cache"] is True
    assert tokenizer.model_max_length == config.get("max_position_embeddings", config.get("n_positions")) >= SEQ
    assert generation["eos_token_id"] == [0, 1]
    assert {key: generation[key] for key in ("do_sample", "temperature", "top_p")} == {
        key: GENERATION[key] for key in ("do_sample", "temperature", "top_p")
    }
    assert "cache_implementation" not in generation and generation["max_length"] == tokenizer.model_max_length
    assert (tokenizer.chat_template is not None) == (name != "own-tokenizer")


@pytest.mark.parametrize("name", STUDENTS)
def test_nothing_else_lies_in_it_and_all_may_read_it(exports: dict[str, Path], name: str) -> None:
    """Faults E and F."""
    folder = exports[name]
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "distill.json",
    }
    expected |= set() if name == "own-tokenizer" else {"chat_template.jinja"}
    assert files.keys() == expected | ({"mtp/mtp.json", "mtp/weights.safetensors"} if name == "mtp" else set())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {plain_mode(folder.parent)}


def plain_mode(folder: Path) -> int:
    (folder / "new").touch()
    return stat.S_IMODE((folder / "new").stat().st_mode)


@pytest.mark.parametrize("name", ["own-tokenizer", "pruned"])
def test_the_snippet_of_its_card_runs_as_printed(exports: dict[str, Path], name: str) -> None:
    card = (exports[name] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ended = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=exports[name], check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ("bot:" if name == "pruned" else "Once upon a time") in ended.stdout


def test_its_card_says_what_it_was_made_of(exports: dict[str, Path]) -> None:
    own, pruned = ((exports[name] / "README.md").read_text() for name in ("own-tokenizer", "pruned"))
    front = [yaml.safe_load(card.split("---")[1]) for card in (own, pruned)]
    assert [values["license"] for values in front] == ["unknown", "apache-2.0"]
    assert all("base_model" not in values for values in front), "a local folder is no model of the hub"
    unmeasured = (exports["gpt2"] / "README.md").read_text()
    assert "which has 1,000." in pruned and "which has" not in unmeasured and "| teacher |" not in unmeasured
    assert "distilled from `teacher`" in pruned and "60 of 16 rows of 32 tokens: 960 rows, 15.00 passes" in pruned


def test_ids_that_are_not_the_tokenizers_are_an_error(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports["pruned"], tmp_path / "export"))
    check_folder(folder)
    for file, key, value in (
        ("config.json", "eos_token_id", 2),
        ("config.json", "bos_token_id", 1),
        ("generation_config.json", "eos_token_id", [1, 3]),
        ("generation_config.json", "pad_token_id", 0),
    ):
        before = (folder / file).read_text()
        rewrite(folder / file, **{key: value})
        with pytest.raises(IntegrityError, match=f"{file}: {key} is .*, by the tokenizer"):
            check_folder(folder)
        (folder / file).write_text(before)


@pytest.mark.parametrize("name", ["checkpoint", "pruned", "upcycled"])
def test_the_row_of_the_padding_id_is_learnt(exports: dict[str, Path], name: str) -> None:
    """Their teacher pads with the end of text, which stands between all documents. Its row began as zeros."""
    weights = load_file(exports[name] / "model.safetensors")
    assert torch.count_nonzero(weights["model.embed_tokens.weight"][0]) > 0
