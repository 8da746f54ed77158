"""Training in float8 as DeepSeek-V3 does it (section 3.3): e4m3 everywhere, a scale for each 1 × 128 of activations and
gradients and each 128 × 128 of weights, sums in fp32. `reference` defines what is computed."""

from kernels.fp8.autograd import experts, linear, norm_linear, swiglu_linear
from kernels.fp8.dispatch import quantizer
from kernels.fp8.formats import ALIGNMENT, BLOCK, FLOAT8, FLOAT8_MAX, Weight
from kernels.fp8.reference import quantize_blocks

__all__ = [
    "ALIGNMENT",
    "BLOCK",
    "FLOAT8",
    "FLOAT8_MAX",
    "Weight",
    "experts",
    "linear",
    "norm_linear",
    "quantize_blocks",
    "quantizer",
    "swiglu_linear",
]
