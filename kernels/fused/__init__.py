"""Operations as Triton kernels: sums in fp32, no atomics. The memory-bound ones take one pass over device memory each.

Same names and signatures as `kernels.eager`, which defines what they compute; `kernels.dispatch` chooses between the
two. Plain `triton.language` alone, so that the CPU tests run them under Triton's interpreter.
"""

from kernels.fused.adamw import adamw_step
from kernels.fused.attention import document_attention, document_attention_backward, visibility
from kernels.fused.cross_entropy import cross_entropy_gradient
from kernels.fused.keys import assemble_keys, assemble_keys_backward
from kernels.fused.latent import latent_attention
from kernels.fused.layout import layout
from kernels.fused.permute import gather_sum
from kernels.fused.rms_norm import add_rms_norm, reciprocal_rms, rms_norm, rms_norm_backward
from kernels.fused.rope import rotate
from kernels.fused.router import route, route_backward
from kernels.fused.swiglu import swiglu, swiglu_backward

__all__ = [
    "adamw_step",
    "add_rms_norm",
    "assemble_keys",
    "assemble_keys_backward",
    "cross_entropy_gradient",
    "document_attention",
    "document_attention_backward",
    "gather_sum",
    "latent_attention",
    "layout",
    "reciprocal_rms",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "route",
    "route_backward",
    "swiglu",
    "swiglu_backward",
    "visibility",
]
