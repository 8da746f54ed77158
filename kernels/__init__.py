"""Tensor operations, each beside its plain-torch reference. Knows tensors, nothing else.

`model/` takes every operation from here: this is the one place that decides what runs where.
Today the reference serves every device.
"""

from kernels.log_probs import linear_log_probs
from kernels.reference import (
    Permutation,
    apply_rope,
    grouped_gemm,
    permutation,
    permute,
    rms_norm,
    route,
    swiglu,
    unpermute,
)

__all__ = [
    "Permutation",
    "apply_rope",
    "grouped_gemm",
    "linear_log_probs",
    "permutation",
    "permute",
    "rms_norm",
    "route",
    "swiglu",
    "unpermute",
]
