"""A tokenizer is copied as what it is (fault E), and a document's text does not become a control token unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from orchestrator.data.pack import PackedPiece, pack_piece
from orchestrator.data.sources import list_pieces
from orchestrator.data.tokenizer import tokenizer_facts
from orchestrator.errors import DataError
from orchestrator.models.tokenizer import PROBE, copy_tokenizer, tokenizer_identity
from orchestrator.spec.data import Data
from orchestrator.store.local import LocalStore
from orchestrator.store.records import describe_folder
from orchestrator.store.shards import read_tokens
from tests.field.cases import END, added_tokens, control_token, junk, save_tokenizer, write_jsonl
from tests.tiny import Json

FOLDER = "data/x"


def test_of_a_downloaded_folder_the_tokenizer_alone_is_copied(tmp_path: Path) -> None:
    model = junk(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    copy_tokenizer(model, tmp_path / "copy")
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == {
        "default": "{{ messages }}",
        "tools": "{{ tools }}",
    }


@pytest.mark.parametrize("beside", [None, "llama", "gpt2", "qwen3", "gemma3_text", "mixtral"])
def test_a_copy_is_the_same_tokenizer_beside_any_model(tmp_path: Path, beside: str | None) -> None:
    """GPT-2 on the hub names no class: beside a Qwen 3, transformers would make other ids of the same file."""
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    if beside:
        AutoConfig.for_model(beside).save_pretrained(tmp_path / "copy")
    found = AutoTokenizer.from_pretrained(tmp_path / "copy")
    expected = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode(PROBE).ids
    assert found(PROBE).input_ids == expected
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 0, None)
    again = tmp_path / "again"
    again.mkdir()
    copy_tokenizer(tmp_path / "copy", again)
    assert (again / "tokenizer_config.json").read_text() == (tmp_path / "copy" / "tokenizer_config.json").read_text()


def test_what_decides_tokens_decides_their_name(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)

    def identity() -> str:
        return tokenizer_identity(describe_folder(tmp_path))

    before = identity()
    (tmp_path / "model.safetensors").write_text("x")
    assert identity() == before
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert identity() != before


def packed(tmp_path: Path, corpus: Path, **values: Any) -> tuple[PackedPiece, np.ndarray]:
    """What became of `corpus`, and all its training ids."""
    store = LocalStore(tmp_path / values.get("special_tokens_in_text", "default"))
    with store.folder_for(f"{FOLDER}/tokenizer") as folder:
        copy_tokenizer(tmp_path / "tokenizer", folder)
    source: Json = {"kind": "jsonl", "paths": [str(corpus)]}
    data = Data.model_validate_json(
        json.dumps({"source": source, "seq_len": 64, "rows_per_shard": 64, "heldout_fraction": 0.1} | values)
    )
    (piece,) = list_pieces(data)
    found = pack_piece(store, FOLDER, data, piece, tokenizer_facts(store.local(f"{FOLDER}/tokenizer")))
    return found, np.concatenate([read_tokens(store, f"{FOLDER}/train", record).ids.ravel() for record in found.train])


def test_the_text_of_a_special_token_is_text_unless_it_is_allowed(tmp_path: Path) -> None:
    """One such text stands in each document, and one such id behind it."""
    save_tokenizer(tmp_path / "tokenizer")
    corpus = control_token(tmp_path / "x.jsonl")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    text, text_ids = packed(tmp_path, corpus)
    allowed, allowed_ids = packed(tmp_path, corpus, special_tokens_in_text="allow")
    assert text.special_documents == allowed.special_documents == text.documents + text.heldout_documents == 160
    ends = [int((ids == tokenizer.token_to_id(END)).sum()) for ids in (text_ids, allowed_ids)]
    assert 0.9 < ends[0] / text.documents < 1.1
    assert 1.8 < ends[1] / text.documents < 2.2
    assert tokenizer.decode(text_ids.tolist(), skip_special_tokens=True).count(END) > 0.7 * text.documents, "some are cut"
    assert END not in tokenizer.decode(allowed_ids.tolist(), skip_special_tokens=True)


def test_tokens_that_are_not_special_are_found_in_any_text(tmp_path: Path) -> None:
    model = added_tokens(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "x.jsonl", [f"{i} <think> b </think> c " * 20 for i in range(40)])
    found, ids = packed(tmp_path, tmp_path / "x.jsonl")
    assert found.special_documents == 0
    assert AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<think>") in ids


def test_the_text_of_a_special_token_may_be_an_error(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    first = json.dumps({"text": "harmless " * 100}) + "\n"
    corpus = write_jsonl(tmp_path / "x.jsonl", ["harmless " * 100, f"one {END} two"])
    with pytest.raises(DataError) as caught:
        packed(tmp_path, corpus, special_tokens_in_text="error")
    assert str(caught.value) == (
        f"{corpus} at byte {len(first)}: contains the special token {END} (data.special_tokens_in_text: encode_as_text | allow)"
    )
