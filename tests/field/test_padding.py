"""The id that a tokenizer pads with is learnt like any other: it may be the end of text, which stands between all documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.models.build import build_model, load_model
from orchestrator.models.share import read_share
from orchestrator.spec.model import Model
from orchestrator.student.distiller import learn_every_row
from tests.field.cases import LLAMA, SHAPE, VOCAB, save_model

PADDING = 0


def gradient(model: Any) -> torch.Tensor:
    """Of the row of `PADDING`, by what the model makes of a text with it in the middle."""
    model.base_model(input_ids=torch.tensor([[5, PADDING, 7]])).last_hidden_state.square().sum().backward()
    return model.get_input_embeddings().weight.grad[PADDING]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_drawn_model_has_the_row(kind: str) -> None:
    config = SHAPE | {"pad_token_id": PADDING} | ({"head_dim": 16} if kind == "gemma3_text" else {})
    model: Any = build_model(Model(type=kind, config=config), VOCAB, 0, "student")
    assert model.get_input_embeddings().weight[PADDING].count_nonzero() > 0
    assert gradient(model).count_nonzero() > 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_is_read_learns_the_row(tmp_path: Path, whole: bool) -> None:
    folder = save_model(tmp_path, config=LLAMA | {"pad_token_id": PADDING, "tie_word_embeddings": False})

    def read() -> Any:
        if whole:
            return load_model(folder, "fp32", torch.device("cpu")).train()
        return read_share(folder, lambda model: {name for name, _ in model.named_parameters()})

    assert gradient(read()).count_nonzero() == 0, "what transformers makes of it"
    learning = read()
    learn_every_row(learning)
    assert gradient(learning).count_nonzero() > 0


def test_padding_beyond_the_vocabulary_is_no_obstacle() -> None:
    """Phi-3's default pads with id 32000."""
    model: Any = build_model(Model(type="phi3", config=SHAPE), VOCAB, 0, "student")
    assert model.get_input_embeddings().num_embeddings == VOCAB
