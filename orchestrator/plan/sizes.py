"""Sizes of a decoder: parameters in all and per token, block by block, from its transformers configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

DENSE_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
DECODERS = (*DENSE_DECODERS, "mixtral", "qwen3_moe", "deepseek_v3")

_SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_QWEN_7B = {**_SEVEN_B, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936}
_MISTRAL_7B = {**_SEVEN_B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SEVEN_B, "vocab_size": 32000},
    "mistral": _MISTRAL_7B,
    "qwen2": _QWEN_7B,
    "qwen3": {**_QWEN_7B, "head_dim": 128},
    "gemma3_text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
    "mixtral": {**_MISTRAL_7B, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "vocab_size": 151936,
    },
    "deepseek_v3": {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}
"""Default values in transformers for keys that are left out; keys not listed here are null, false or absent there."""
_ALIASES = {"num_experts": "num_local_experts", "num_local_experts": "n_routed_experts"}
"""Other names of a key, where transformers maps them for the type."""
MOST_BLOCKS = 10_000
"""Deeper is a slip of the pen."""


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention, or multi-head latent attention (DeepSeek-V2, 2024) where `kv_rank` is not 0."""

    heads: int
    kv_heads: int
    qk_dim: int
    """Width of a query or key of one head, its rotary part included."""
    v_dim: int
    q_rank: int
    """Width of the queries' latent; 0 where queries are projected at once."""
    kv_rank: int
    """Width of the latent that keys and values are made of."""
    rope_dim: int
    """Width of the one rotary key that all heads share (MLA)."""


@dataclass(frozen=True)
class Block:
    """Parameters of one decoder block, and the widths of its feed-forward parts."""

    attention: int
    feed_forward: int
    """Parameters that every token passes through: a dense feed-forward part, or shared experts and the router."""
    norms: int
    expert: int
    """Parameters of one routed expert."""
    experts: int
    """Routed experts; 0 in a dense block."""
    chosen: int
    """Routed experts that one token passes."""
    width: int
    """Inner width of what every token passes."""
    expert_width: int

    @property
    def shared(self) -> int:
        """Everything but the routed experts."""
        return self.attention + self.feed_forward + self.norms

    @property
    def total(self) -> int:
        return self.shared + self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that one token passes."""
        return self.shared + self.chosen * self.expert


@dataclass(frozen=True)
class Decoder:
    """A causal language model as the planner sees it."""

    kind: str
    width: int
    vocab: int
    attention: Attention
    blocks: tuple[Block, ...]
    embedding: int
    head: int
    """0 where the head is tied to the embedding."""
    head_passes: int = 1
    """Number of times that the head is applied to a position."""

    @property
    def total(self) -> int:
        return self.embedding + sum(block.total for block in self.blocks) + self.width + self.head

    @property
    def active(self) -> int:
        """Parameters that one token uses, embedding and head included."""
        return self.embedding + sum(block.active for block in self.blocks) + self.width + self.head

    @property
    def experts(self) -> int:
        """Parameters of all routed experts."""
        return sum(block.experts * block.expert for block in self.blocks)

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: the active ones less embedding and norms, and the head, tied or not."""
        blocks = sum(block.active - block.norms for block in self.blocks)
        return blocks + self.head_passes * self.vocab * self.width


def decoder(kind: str, config: Mapping[str, Any], vocab_size: int | None = None) -> Decoder | None:
    """The decoder that transformers builds from `kind` and `config`; None for what the planner does not know.

    `vocab_size` goes before that of `config`. Buffers and DeepSeek-V3's multi-token prediction module, which transformers
    does not build, are not counted.
    """
    if kind not in DECODERS:
        return None
    c = _values(kind, config)
    if vocab_size is not None:
        c["vocab_size"] = vocab_size
    if not _plausible(kind, c):
        return None
    attention = _attention(kind, c)
    blocks = tuple(_block(kind, c, attention, index) for index in range(c["num_hidden_layers"]))
    embedding = c["vocab_size"] * c["hidden_size"]
    tied = bool(c.get("tie_word_embeddings"))
    return Decoder(kind, c["hidden_size"], c["vocab_size"], attention, blocks, embedding, 0 if tied else embedding)


def with_mtp(model: Decoder, depth: int) -> Decoder:
    """`model` with `depth` multi-token-prediction modules (arXiv:2412.19437, 2.2), the last of its blocks: each a block with a
    projection of two widths to one and three norms, whose states pass the shared head once more."""
    last = model.blocks[-1]
    module = replace(last, attention=last.attention + 2 * model.width**2, norms=last.norms + 3 * model.width)
    return replace(model, blocks=model.blocks + (module,) * depth, head_passes=1 + depth)


def _values(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(config)
    for alias, name in _ALIASES.items():
        if alias in given and name in DEFAULTS[kind]:
            given[name] = given.pop(alias)
    values = {**DEFAULTS[kind], **given}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if kind == "deepseek_v3":
        values["q_lora_rank"] = values["q_lora_rank"] or 0
    return values


def _plausible(kind: str, c: Mapping[str, Any]) -> bool:
    """Return whether the formulas can be applied; other values are left for transformers to reject when the model is built."""
    counts = [c[key] for key in (*DEFAULTS[kind], "num_key_value_heads")] + [c.get("head_dim") or 1]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return False
    positive = ("hidden_size", "num_attention_heads", "vocab_size", *(["decoder_sparse_step"] if kind == "qwen3_moe" else ()))
    return all(c[key] > 0 for key in positive) and c["num_hidden_layers"] <= MOST_BLOCKS


def _attention(kind: str, c: Mapping[str, Any]) -> Attention:
    heads = c["num_attention_heads"]
    if kind == "deepseek_v3":
        rope, nope = c["qk_rope_head_dim"], c["qk_nope_head_dim"]
        return Attention(heads, heads, nope + rope, c["v_head_dim"], c["q_lora_rank"], c["kv_lora_rank"], rope)
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    return Attention(heads, c["num_key_value_heads"], head_dim, head_dim, 0, 0, 0)


def _attention_parameters(kind: str, c: Mapping[str, Any], a: Attention) -> int:
    d, biased = c["hidden_size"], bool(c.get("attention_bias"))
    if kind == "deepseek_v3":
        q_dim, latent = a.heads * a.qk_dim, a.kv_rank + a.rope_dim
        queries = d * a.q_rank + a.q_rank + a.q_rank * q_dim if a.q_rank else d * q_dim
        keys_values = d * latent + a.kv_rank + a.kv_rank * a.heads * (a.qk_dim - a.rope_dim + a.v_dim)
        return queries + keys_values + a.heads * a.v_dim * d + biased * (a.q_rank + latent + d)
    projected = (a.heads + 2 * a.kv_heads) * a.qk_dim
    norms = 2 * a.qk_dim if kind in ("qwen3", "qwen3_moe", "gemma3_text") else 0
    biases = projected if kind == "qwen2" else biased * (projected + d)
    return d * projected + a.heads * a.qk_dim * d + norms + biases


def _block(kind: str, c: Mapping[str, Any], attention: Attention, index: int) -> Block:
    d, ffn = c["hidden_size"], c["intermediate_size"]
    own = _attention_parameters(kind, c, attention)
    norms = (4 if kind == "gemma3_text" else 2) * d
    if not _routed(kind, c, index):
        biases = 2 * ffn + d if c.get("mlp_bias") else 0
        return Block(own, 3 * d * ffn + biases, norms, 0, 0, 0, ffn, 0)
    experts = c["n_routed_experts" if kind == "deepseek_v3" else "num_local_experts"]
    width = c.get("moe_intermediate_size", ffn)
    shared = c.get("n_shared_experts", 0) * width
    return Block(own, 3 * d * shared + d * experts, norms, 3 * d * width, experts, c["num_experts_per_tok"], shared, width)


def _routed(kind: str, c: Mapping[str, Any], index: int) -> bool:
    """Return whether block `index` has routed experts."""
    if kind == "deepseek_v3":
        return index >= c["first_k_dense_replace"]
    if kind == "qwen3_moe":
        dense = c.get("mlp_only_layers") or ()
        return c["num_local_experts"] > 0 and index not in dense and (index + 1) % c["decoder_sparse_step"] == 0
    return kind == "mixtral"
