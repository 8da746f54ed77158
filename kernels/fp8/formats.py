"""What a quantised matrix is: float8 codes (e4m3, largest 448) and fp32 scales, value = code · scale.

Activations and gradients have a scale for each 1 × 128 of the dimension that a product sums over, weights one for each
128 × 128 (DeepSeek-V3, section 3.3.2). Hopper multiplies float8 only where both operands lie along that dimension, so
an operand that is summed over one dimension here and over another there is quantised twice. Letters: M rows, K the
dimension summed over, N rows of a weight, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
ALIGNMENT = 16  # elements: what a copy engine wants of a row of float8


class Rows(NamedTuple):
    """A scale for each 1 × 128. codes [M, K]; scales [ceil(K / 128), M], so that those of a tile's rows are one copy.
    Either may be a view of wider rows: rows begin a multiple of 16 bytes apart. The rest of a row of codes is zero."""

    codes: Tensor
    scales: Tensor


class Blocks(NamedTuple):
    """A scale for each 128 × 128. codes [N, K] or [E, N, K]; scales [(E,) ceil(N / 128), ceil(K / 128)]."""

    codes: Tensor
    scales: Tensor


class Weight(NamedTuple):
    """A weight in the two forms that training needs: as it is for y = x Wᵀ, and transposed for its gradient, the same
    codes in another order."""

    forward: Blocks
    backward: Blocks
