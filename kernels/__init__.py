"""Tensor operations, each beside its plain-torch reference. Knows tensors, nothing else.

`model/` takes every operation from here. `reference` defines what is computed; `dispatch` decides what computes it:
Triton (`fused`) on CUDA, torch (`eager`) elsewhere.
"""

from kernels.attention import attention, visibility
from kernels.autograd import add_rms_norm, apply_rope, keys_and_values, rms_norm, route, swiglu
from kernels.dispatch import implementation
from kernels.divergence import divergence, linear_divergence
from kernels.eager import NO_TARGET, join_master, split_master
from kernels.grouped import Permutation, compact, grouped_gemm, layout, permutation, permute, permute_gates, unpermute
from kernels.inference import latent_attention, routed_experts
from kernels.log_probs import linear_cross_entropy, linear_log_probs
from kernels.reference import PREFIX, RoutingRule

__all__ = [
    "NO_TARGET",
    "PREFIX",
    "Permutation",
    "RoutingRule",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "compact",
    "divergence",
    "grouped_gemm",
    "implementation",
    "join_master",
    "keys_and_values",
    "latent_attention",
    "layout",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_probs",
    "permutation",
    "permute",
    "permute_gates",
    "rms_norm",
    "route",
    "routed_experts",
    "split_master",
    "swiglu",
    "unpermute",
    "visibility",
]
