"""RoPE and YaRN between our fields and the published `rope_parameters` (transformers ≥ 5; before: `rope_scaling`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError
from model.config import ModelConfig


def rope_to_published(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` entry of config.json."""
    if config.rope_factor == 1:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn = {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.original_max_position,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
    }
    if config.is_mla:
        yarn |= {"mscale": config.mscale, "mscale_all_dim": config.mscale_all_dim}
    return yarn


def rope_from_published(published: Mapping[str, Any]) -> dict[str, Any]:
    """Our rope fields from a published config.json, old or new."""
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    theta = rope.get("rope_theta", published.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "yarn" or rope.get("attention_factor") is not None or rope.get("truncate") is False:
        raise ConfigError(f"rope_parameters {rope}: only 'default' and plain 'yarn' are implemented")
    original = rope.get("original_max_position_embeddings") or published["max_position_embeddings"]
    fields = {
        "rope_theta": theta,
        "rope_factor": rope.get("factor") or published["max_position_embeddings"] / original,
        "original_max_position": original,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
    }
    if "kv_lora_rank" in published:
        # Without mscale_all_dim the whole factor 0.1 ln s + 1 is on the cosines and none in the softmax scale.
        all_dim = rope.get("mscale_all_dim") or 0.0
        fields |= {"mscale": (rope.get("mscale") or 1.0) if all_dim else 1.0, "mscale_all_dim": all_dim}
    return fields


def deinterleave(heads: int, before: int, rope_dim: int) -> Tensor:
    """Published row of each of our rows, for heads of `before` unrotated rows and then `rope_dim` rotated ones.

    Published DeepSeek weights rotate rows (2i, 2i + 1) together, ours (i, i + R/2).
    """
    rotated = torch.arange(rope_dim).view(-1, 2).T.flatten() + before
    one_head = torch.cat([torch.arange(before), rotated])
    return (torch.arange(heads)[:, None] * (before + rope_dim) + one_head).flatten()
