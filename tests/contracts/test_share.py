"""A share of a model has the values of the whole one, to the bit, and nothing of what it does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import SpecError
from orchestrator.models.build import build_model, load_model, model_config
from orchestrator.models.head import check_head, trial_model
from orchestrator.models.share import drawn_share, plainly_named, read_share
from orchestrator.models.stages import check_pieces
from orchestrator.spec.model import Model
from tests.contracts.test_stages import MODELS, SMALL, VOCAB

CONVERTED = {"mixtral", "qwen3-moe", "deepseek-v3"}
"""transformers stores their experts one by one and holds them together."""


def second_half(model: Any) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    return {*names[len(names) // 2 :]}


def differences(share: Any, whole: Any) -> list[str]:
    """Names of what is held and has another value than in `whole`."""
    expected = whole.state_dict()
    assert share.state_dict().keys() == expected.keys()
    return [name for name, value in share.state_dict().items() if not value.is_meta and not torch.equal(value, expected[name])]


def held(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("name", MODELS)
def test_a_drawn_share_is_that_of_the_whole(seed: int, name: str) -> None:
    whole = build_model(MODELS[name], VOCAB, seed, "student")
    before = torch.random.get_rng_state()
    share = drawn_share(model_config(MODELS[name], VOCAB, "student"), seed, second_half)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert held(share) == second_half(whole)
    assert not differences(share, whole)
    assert share.config.to_dict() == whole.config.to_dict()
    assert (share.lm_head.weight is share.model.embed_tokens.weight) == (name in ("llama", "gemma3"))
    for (found, mine), (expected, theirs) in zip(share.named_buffers(), whole.named_buffers(), strict=True):
        assert found == expected
        assert torch.equal(mine, theirs)
    reseeded = drawn_share(model_config(MODELS[name], VOCAB, "student"), seed + 1, second_half)
    assert differences(reseeded, whole)


@pytest.mark.parametrize("name", MODELS)
def test_a_read_share_is_that_of_the_whole(seed: int, name: str, tmp_path: Path) -> None:
    whole: Any = build_model(MODELS[name], VOCAB, seed, "student")
    for buffer in ("e_score_correction_bias",):
        for owner in whole.modules():
            if buffer in owner._buffers:
                owner._buffers[buffer].normal_()
    whole.generation_config.update(do_sample=True, top_k=3)
    whole.save_pretrained(tmp_path / "model", save_original_format=False, max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    share: Any = read_share(tmp_path / "model", second_half)
    assert held(share) == second_half(whole)
    assert not differences(share, whole)
    assert share.training
    assert share.generation_config.top_k == 3
    assert (share.lm_head.weight is share.model.embed_tokens.weight) == (name in ("llama", "gemma3"))
    assert not differences(load_model(tmp_path / "model", "fp32", torch.device("cpu")), whole), "transformers reads it as well"
    other = build_model(MODELS[name], VOCAB, seed + 1, "student")
    assert differences(share, other)


def test_tied_weights_stay_one(seed: int) -> None:
    spec = MODELS["llama"]
    for chosen in ({"model.embed_tokens.weight"}, {"model.norm.weight"}):
        share: Any = drawn_share(model_config(spec, VOCAB, "student"), seed, lambda _model, chosen=chosen: chosen)
        assert held(share) == chosen
        assert share.lm_head.weight is share.model.embed_tokens.weight


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_says_whether_its_tensors_can_be_read_one_by_one(seed: int, name: str, tmp_path: Path) -> None:
    model = build_model(MODELS[name], VOCAB, seed, "student")
    model.save_pretrained(tmp_path / "as transformers does")
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    assert plainly_named(tmp_path / "plain")
    assert plainly_named(tmp_path / "as transformers does") == (name not in CONVERTED)
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    for faulty in (tensors | {"x": torch.zeros(1)}, tensors | {"model.norm.weight": torch.zeros(3)}):
        save_file(faulty, file, {"format": "pt"})
        assert not plainly_named(tmp_path / "plain")
    file.write_bytes(b"\x10\x00")
    assert not plainly_named(tmp_path / "plain")


def test_a_folder_that_lacks_a_tensor_is_refused(seed: int, tmp_path: Path) -> None:
    build_model(MODELS["qwen3"], VOCAB, seed, "student").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert held(read_share(tmp_path, lambda _: {"lm_head.weight"})) == {"lm_head.weight"}
    with pytest.raises(SpecError, match=r"its weights are not those of its config\.json: model\.norm\.weight and 0 more"):
        read_share(tmp_path, lambda _: {"lm_head.weight", "model.norm.weight"})


def test_a_small_trial_tells_what_the_whole_model_would(seed: int) -> None:
    for spec in MODELS.values():
        config = model_config(spec, VOCAB, "student")
        trial = trial_model(config)
        assert config.num_hidden_layers == SMALL["num_hidden_layers"], "the model's own is left alone"
        assert trial.num_parameters() < build_model(spec, VOCAB, seed, "student").num_parameters()
        check_head(trial, "student")
        check_pieces(trial, "student")
    granite = trial_model(model_config(Model(type="granite", config={**SMALL, "embedding_multiplier": 12.0}), VOCAB, "student"))
    with pytest.raises(SpecError, match="does more than to pass on hidden states"):
        check_pieces(granite, "student")
