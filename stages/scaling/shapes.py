"""How large a model is, and which shape a ladder takes for a wanted size.

The measure of size is V1's M, `ModelConfig.non_embedding_flops_per_token`: counted from the config itself, so that
grouped queries, latent attention and experts count as what they are.
"""

from __future__ import annotations

import math

from infra.errors import ConfigError
from model.config import ModelConfig

TOLERANCE = 1 / 3  # what a shape's M may exceed the wanted one by, or fall short of it
GRANULE = 8  # what widths other than the model's are multiples of


def at_shape(base: ModelConfig, n_heads: int, n_layers: int) -> ModelConfig:
    """`base` with other depth and width: heads keep their widths, everything else grows with the number of heads."""
    share = n_heads / base.n_heads
    kv_heads = max(n for n in range(1, n_heads + 1) if n_heads % n == 0 and n <= max(1, base.n_kv_heads * share))
    widths = {name: getattr(base, name) for name in ("d_ff", "moe_d_ff", "q_lora_rank", "kv_lora_rank")}
    return base.replace(
        d_model=base.d_model // base.n_heads * n_heads,
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        n_layers=n_layers,
        n_dense_layers=min(base.n_dense_layers, n_layers),
        **{name: GRANULE * max(1, round(width * share / GRANULE)) for name, width in widths.items() if width},
    )


def shape_for(base: ModelConfig, scale: float, sequence_length: int) -> ModelConfig:
    """The model nearest to `scale` FLOPs per token and to the base's proportion of depth to width.

    Width grows by whole heads, depth by whole layers, and nearness is the sum of both deviations in logs. Raises
    ConfigError where no shape's M is within a third.
    """
    if base.d_model % base.n_heads:
        raise ConfigError(
            f"model: d_model={base.d_model} must be a multiple of n_heads={base.n_heads}: a ladder adds heads"
        )

    def size(n_heads: int, n_layers: int) -> int:
        return at_shape(base, n_heads, n_layers).non_embedding_flops_per_token(sequence_length)

    found: list[tuple[float, float, ModelConfig]] = []
    n_heads = 1
    while size(n_heads, 1) <= scale * (1 + TOLERANCE):
        layer = size(n_heads, base.n_dense_layers + 2) - size(n_heads, base.n_dense_layers + 1)
        more = max(0.0, (scale - size(n_heads, 1)) / layer)
        for n_layers in {1 + math.floor(more), 1 + math.ceil(more)}:
            model = at_shape(base, n_heads, n_layers)
            miss = abs(math.log(size(n_heads, n_layers) / scale))
            proportion = abs(math.log(n_layers * base.n_heads / (n_heads * base.n_layers)))
            found.append((miss + proportion, miss, model))
        n_heads += 1
    near = [one for one in found if one[1] <= math.log(1 + TOLERANCE)]
    if not near:
        raise ConfigError(
            f"no shape like the base has M = {scale:.3g} FLOPs per token to within {TOLERANCE:.0%} (one head and one "
            f"layer have {size(1, 1):.3g}): choose another scale, or a base of narrower heads"
        )
    return min(near, key=lambda one: one[:2])[2]
