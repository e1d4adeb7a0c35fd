"""What a saved model is told of its tokenizer and its teacher, where one of them does not fit (fault A)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from orchestrator.errors import IntegrityError
from orchestrator.models.generation import check_folder, complete_folder
from tests.field.cases import LLAMA, VOCAB, added_tokens, save_model, save_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def completed(tmp_path: Path, tokenizer: Path, settings: Any = None, seq_len: int = 64, **config: Any) -> GenerationConfig:
    folder = save_model(tmp_path / "model", config=LLAMA | config)
    complete_folder(folder, tokenizer, seq_len, settings)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    complete_folder(folder, tokenizer, seq_len, settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "once more changes nothing"
    check_folder(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder)


def test_ends_that_the_model_does_not_know_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    found = completed(tmp_path, tokenizer, {"eos_token_id": [VOCAB, 7, 0]})
    assert found.eos_token_id == [0, 7]
    assert completed(tmp_path, tokenizer, {"eos_token_id": VOCAB + 5}).eos_token_id == 0


def test_settings_that_do_not_agree_are_kept_as_the_teacher_has_them(tmp_path: Path, tokenizer: Path) -> None:
    """Vicuna's: a temperature, and no sampling. transformers loads it, and refuses to save it once it is changed."""
    assert completed(tmp_path, tokenizer, {"temperature": 0.9, "top_p": 0.6}).temperature == 0.9


def test_without_a_teachers_settings_its_own_stay(tmp_path: Path, tokenizer: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7, "use_cache": False}))
    complete_folder(folder, tokenizer, 64)
    found = GenerationConfig.from_pretrained(folder)
    assert (found.top_k, found.eos_token_id, found.use_cache) == (7, 0, True)


def test_it_has_the_positions_that_it_was_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    completed(tmp_path, tokenizer, seq_len=1000)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["max_position_embeddings"] == 1000
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 1000


def test_code_that_does_not_come_along_is_not_named(tmp_path: Path, tokenizer: Path) -> None:
    completed(tmp_path, tokenizer, auto_map={"AutoConfig": "configuration_x.X"})
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_an_end_beyond_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    folder = added_tokens(tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</think>"}))
    complete_folder(save_model(tmp_path / "model"), folder, 64)
    with pytest.raises(IntegrityError, match=f"eos_token_id is {VOCAB + 1}, but the model knows {VOCAB} ids only"):
        check_folder(tmp_path / "model")
