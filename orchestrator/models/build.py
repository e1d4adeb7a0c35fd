"""Models from configurations and from folders; transformers holds the architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from orchestrator.errors import SpecError
from orchestrator.spec.model import Model

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}

NO_SPECIAL_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

READ_UNDECLARED = {"head_dim"}
"""Values that modelling files read of any configuration, though not every configuration class declares them."""


def model_config(model: Model, vocab_size: int, section: str) -> PreTrainedConfig:
    """The transformers configuration of `model`; `section` names it in errors.

    It has no special ids: those of a class may lie beyond the vocabulary, and the row of a padding id would neither be drawn
    nor learnt. What is saved has the tokenizer's.

    Raises `SpecError` for an unknown type, an unknown configuration key (which transformers would take silently), a
    vocabulary other than `vocab_size`, and whatever the configuration class itself refuses.
    """
    try:
        default = AutoConfig.for_model(model.type)
    except (ValueError, KeyError) as error:
        raise SpecError(f"{section}.model.type: transformers knows no {model.type!r}") from error
    known = {*default.to_dict(), *default.attribute_map, *READ_UNDECLARED}
    for key in model.config:
        if key not in known:
            raise SpecError(f"{section}.model.config.{key}: not a configuration value of {model.type!r}")
    asked = model.config.get("vocab_size", vocab_size)
    if asked != vocab_size:
        raise SpecError(f"{section}.model.config.vocab_size: {asked}, but the teacher's vocabulary has {vocab_size} ids")
    values: dict[str, Any] = {**model.config, "vocab_size": vocab_size}
    if hasattr(default, "num_mtp_layers"):
        values.setdefault("num_mtp_layers", 0)  # DeepSeek-V3's default claims one that no class here builds
    try:
        return AutoConfig.for_model(model.type, **values | NO_SPECIAL_IDS)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise SpecError(f"{section}.model.config: {error}") from error


def build_model(model: Model, vocab_size: int, seed: int, section: str) -> PreTrainedModel:
    """A freshly initialised causal LM in fp32; the same `seed` gives the same weights on every machine."""
    return draw_model(model_config(model, vocab_size, section), seed)


def draw_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The causal LM of `config` in fp32, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def load_model(
    folder: Path, dtype: Literal["bf16", "fp32", "fp8"], on: torch.device, distributed: DistributedConfig | None = None
) -> PreTrainedModel:
    """The causal LM in `folder`, from safetensors only, ready for inference; this process's share of it if `distributed`.

    Raises `SpecError` if its weights cannot be read or are not those of its configuration.
    """
    kept: dict[str, Any] = {
        "trust_remote_code": False,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if distributed is not None:
        kept["distributed_config"] = distributed
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **kept)
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        raise SpecError(f"{folder} cannot be read as a causal language model: {str(error).splitlines()[0]}") from error
    model, found = loaded
    if lacking := [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]:
        raise SpecError(f"{folder}: its weights are not those of its config.json: {lacking[0]} and {len(lacking) - 1} more")
    torch.nn.Module.to(model, on)
    return model.eval()


@torch.no_grad()
def resize_vocabulary(model: PreTrainedModel, ids: int) -> None:
    """Give `model` a vocabulary of `ids`, in place: the last ones are dropped, or as many that mean nothing yet added."""
    before: int = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(ids, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[before:] = 0.0  # type: ignore[index,union-attr]


def outline(folder: Path) -> PreTrainedModel:
    """The causal LM in `folder` without any weights: for its shapes."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def device(gpus: float) -> torch.device:
    """Return the device for a process that asked for `gpus`; Ray may show it GPUs that it did not ask for."""
    return torch.device("cuda" if gpus > 0 else "cpu")
