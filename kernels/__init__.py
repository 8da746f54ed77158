"""Tensor operations, each beside its plain-torch reference. Knows tensors, nothing else.

`model/` takes every operation from here: this is the one place that decides what runs where. `reference` defines
what is computed; today the same few implementations serve every device.
"""

from kernels.autograd import apply_rope, rms_norm, swiglu
from kernels.grouped import Permutation, compact, grouped_gemm, permutation, permute, permute_gates, unpermute
from kernels.inference import routed_experts
from kernels.log_probs import linear_cross_entropy, linear_log_probs
from kernels.reference import route

__all__ = [
    "Permutation",
    "apply_rope",
    "compact",
    "grouped_gemm",
    "linear_cross_entropy",
    "linear_log_probs",
    "permutation",
    "permute",
    "permute_gates",
    "rms_norm",
    "route",
    "routed_experts",
    "swiglu",
    "unpermute",
]
