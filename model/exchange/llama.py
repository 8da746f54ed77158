"""The llama layout: also that of DeepSeek LLM 7B and 67B, and, with three biases more, of Qwen2 (`qwen.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from model.config import ModelConfig
from model.exchange.layout import Entry, Part, block_norms, ends, one, swiglu
from model.exchange.rope import rope_from_published, rope_to_published


def entries(config: ModelConfig) -> list[Entry]:
    """Our tensors as the published ones."""
    table = ends(config.vocab_size, config.d_model, config.tie_embeddings)
    for layer in range(config.n_layers):
        ours, published = f"blocks.{layer}", f"model.layers.{layer}"
        table += block_norms(ours, published, config.d_model)
        table += [
            Entry(f"{ours}.attention.qkv.weight", qkv(config, published, "weight")),
            one(f"{ours}.attention.out.weight", f"{published}.self_attn.o_proj.weight", config.d_model),
        ]
        table += swiglu(f"{ours}.ffn", f"{published}.mlp", config.d_model, config.d_ff)
    return table


def qkv(config: ModelConfig, published: str, kind: str) -> tuple[Part, ...]:
    """Weights or biases of the three projections of one layer."""
    rows = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
    return tuple(Part(f"{published}.self_attn.{x}_proj.{kind}", n * config.head_dim) for x, n in rows.items())


def to_published(config: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        **common_to_published(config),
        "head_dim": config.head_dim,
        "num_key_value_heads": config.n_kv_heads,
    }


def from_published(published: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from config.json."""
    if published.get("attention_bias") or published.get("mlp_bias"):
        raise ConfigError("config.json: llama with attention_bias or mlp_bias is not implemented")
    return ModelConfig(family="llama", **common_from_published(published), **heads_from_published(published))


def heads_from_published(published: Mapping[str, Any]) -> dict[str, Any]:
    """Grouped-query heads."""
    fields = {"n_kv_heads": published.get("num_key_value_heads"), "head_dim": published.get("head_dim")}
    return {name: value for name, value in fields.items() if value is not None}


def common_to_published(config: ModelConfig) -> dict[str, Any]:
    """What every family's config.json says."""
    return {
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope_to_published(config),
    }


def common_from_published(published: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every family shares."""
    if published.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act {published['hidden_act']!r}; only 'silu' is implemented")
    names = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "max_position": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
    }
    missing = [name for name in names.values() if name not in published]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    return {
        **{ours: published[name] for ours, name in names.items()},
        "init_std": published.get("initializer_range", 0.02),
        "tie_embeddings": published.get("tie_word_embeddings", False),
        **rope_from_published(published),
    }
