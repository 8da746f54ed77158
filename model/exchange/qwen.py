"""The Qwen2 layout: llama's, with biases on the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from model.config import ModelConfig
from model.exchange import llama
from model.exchange.layout import Entry


def entries(config: ModelConfig) -> list[Entry]:
    """Our tensors as the published ones."""
    biases = [
        Entry(f"blocks.{layer}.attention.qkv.bias", llama.qkv(config, f"model.layers.{layer}", "bias"))
        for layer in range(config.n_layers)
    ]
    return llama.entries(config) + biases


def to_published(config: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        **llama.common_to_published(config),
        "head_dim": config.head_dim,
        "num_key_value_heads": config.n_kv_heads,
    }


def from_published(published: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from config.json."""
    if published.get("use_sliding_window"):
        raise ConfigError("config.json: qwen2 with use_sliding_window is not implemented")
    fields = {**llama.common_from_published(published), **llama.heads_from_published(published)}
    return ModelConfig(family="qwen2", **fields)
