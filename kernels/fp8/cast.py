"""fp32 to float8 inside a kernel, and the scale of a block."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter drops the carry into the exponent when it casts to e4m3 (0.4905 becomes 0.25), so there the
# number is rounded to the grid first. Hardware needs no help.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def e4m3(x):
    """The nearest e4m3 of fp32 numbers, ties to even; 448 beyond it."""
    if INTERPRETED:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # hardware saturates by itself
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0  # multiples of 2⁻⁹
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def scale_of(largest, POWER_OF_TWO: tl.constexpr):
    """`reference.scale_of`."""
    scale = tl.maximum(largest, 1e-10) * (1.0 / 448.0)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & -8388608).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def inverse_of(scale):
    """What numbers are multiplied with to become codes."""
    return tl.div_rn(1.0, scale)
