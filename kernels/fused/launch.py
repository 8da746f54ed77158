"""What the kernels of this folder and their launches have in common. Letters: N rows, D width."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies the bits of bf16 numbers; fp32 it multiplies right.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = 8192  # elements of a program's tile: 16 KB of bf16 in flight, which is what keeps HBM busy


def rows_per_program(width: int) -> int:
    """Rows of a tile of about TILE elements; a power of two, as is `width`."""
    return max(1, min(32, TILE // width))


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once if each fills a processor: for those that loop over rows or tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def as_rows(x: Tensor) -> Tensor:
    """[..., D] as contiguous [N, D]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32, of fp32 numbers too."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
