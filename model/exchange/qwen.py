"""The Qwen2 and Qwen3 layouts: llama's, with biases on the query, key and value projections (Qwen2) or with an
RMSNorm on each query and key head before RoPE (Qwen3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from model.config import ModelConfig
from model.exchange import llama
from model.exchange.layout import Entry, one

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
QWEN3_HEAD_DIM = 128  # where config.json leaves it out


def entries(config: ModelConfig) -> list[Entry]:
    """Our tensors as the published ones."""
    table = llama.entries(config)
    for layer in range(config.n_layers):
        ours, published = f"blocks.{layer}.attention", f"model.layers.{layer}"
        if config.family == "qwen2":
            table.append(Entry(f"{ours}.qkv.bias", llama.qkv(config, published, "bias")))
        else:
            table += [
                one(f"{ours}.{x}_norm.weight", f"{published}.self_attn.{x}_norm.weight", config.head_dim) for x in "qk"
            ]
    return table


def to_published(config: ModelConfig) -> dict[str, Any]:
    """config.json. ConfigError for Qwen2 heads of their own width: its config has no word for it, vLLM divides."""
    if config.family == "qwen2" and config.head_dim * config.n_heads != config.d_model:
        raise ConfigError(f"qwen2: head_dim ({config.head_dim}) must be d_model / n_heads; qwen3 may have another")
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "use_sliding_window": False,
        **llama.common_to_published(config),
        "head_dim": config.head_dim,
        "num_key_value_heads": config.n_kv_heads,
    }


def from_published(published: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from config.json."""
    family = published["model_type"]
    for name in ("use_sliding_window", "attention_bias"):
        if published.get(name):
            raise ConfigError(f"config.json: {family} with {name} is not implemented")
    if other := set(published.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError(f"config.json: layer_types {sorted(other)}; only 'full_attention' is implemented")
    if "num_key_value_heads" not in published:
        raise ConfigError("config.json lacks num_key_value_heads")
    fields = {**llama.common_from_published(published), **llama.heads_from_published(published)}
    if family == "qwen3":
        fields.setdefault("head_dim", QWEN3_HEAD_DIM)
    return ModelConfig(family=family, **fields)
