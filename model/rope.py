"""Rotary positions (2104.09864) and their YaRN extension (2309.00071).

Pairs are (x[i], x[i + R/2]), the "half" convention; DeepSeek's published weights interleave (x[2i], x[2i+1]), and
`model.exchange` reorders rows between the two. Letters: R rotary dims, ... any position dims.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, [..., R/2], fp32, YaRN's attention factor multiplied in."""

    cos: Tensor
    sin: Tensor

    def per_head(self) -> Rotation:
        """The same with a dimension of one for the heads: [..., 1, R/2]."""
        return Rotation(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))


def rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of integer `positions` [...]; angles in fp32, rounded to `dtype` at the end."""
    angles = positions[..., None].float() * inverse_frequencies(config, positions.device)
    factor = attention_factor(config)
    return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angle per position of each rotary pair, fp32 [R/2]; YaRN's "NTK by parts" blend when `rope_factor` > 1.

    A pair that turns more than `beta_fast` times within the original context keeps its frequency, one that turns
    less than `beta_slow` times is slowed by `rope_factor`, and a linear ramp joins them (YaRN, section 3.2).
    """
    # Made where it is used: to copy it there would hold the host back until the device has done all that is queued.
    pairs = torch.arange(0, config.rope_dim, 2, dtype=torch.float32, device=device)
    kept = 1.0 / (config.rope_theta ** (pairs / config.rope_dim))
    if config.rope_factor == 1:
        return kept
    assert config.original_max_position is not None

    def pair_turning(turns: float) -> float:
        ratio = config.original_max_position / (turns * 2 * math.pi)
        return config.rope_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(config.beta_fast)), 0)
    high = min(math.ceil(pair_turning(config.beta_slow)), config.rope_dim - 1)
    steps = torch.arange(config.rope_dim // 2, dtype=torch.float32, device=device) - low
    interpolate = (steps / max(high - low, 0.001)).clamp(0, 1)
    return kept / config.rope_factor * interpolate + kept * (1 - interpolate)


def attention_factor(config: ModelConfig) -> float:
    """What YaRN multiplies cosines and sines by.

    Grouped-query families put the whole √t = 0.1·ln s + 1 here (YaRN, section 3.4). MLA rotates only the decoupled
    part, so DeepSeek puts `mscale_all_dim`'s share into the softmax scale and the ratio of the two here: 1 in V2, V3.
    """
    if not config.is_mla:
        return _magnitude(config, 1.0)
    return _magnitude(config, config.mscale) / _magnitude(config, config.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """What query·key is multiplied by before the softmax: 1/√(head width), times t for MLA under YaRN."""
    scale = config.head_dim**-0.5
    return scale * _magnitude(config, config.mscale_all_dim) ** 2 if config.is_mla else scale


def _magnitude(config: ModelConfig, weight: float) -> float:
    return 0.1 * weight * math.log(config.rope_factor) + 1.0
