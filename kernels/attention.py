"""Attention over a sequence, causal, and inside its documents where they are told apart.

Each case has another fastest implementation: on CUDA cuDNN's kernel without documents and ours with them, which skips
what no document needs; on a CPU torch's, with a dense mask. Letters as in `kernels.reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import eager
from kernels.dispatch import implementation

CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # in order of preference


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTv: Tensor, visible: Tensor, scale: float) -> Tensor:
        y_BHTv, lse_BHT = implementation(q_BHTd).document_attention(q_BHTd, k_BKTd, v_BKTv, visible, scale)
        ctx.save_for_backward(q_BHTd, k_BKTd, v_BKTv, y_BHTv, lse_BHT, visible)
        ctx.scale = scale
        return y_BHTv

    @staticmethod
    def backward(ctx, grad_BHTv: Tensor):
        fused = implementation(grad_BHTv)
        return *fused.document_attention_backward(grad_BHTv, *ctx.saved_tensors, ctx.scale), None, None


def visibility(document_BT: Tensor) -> Tensor:
    """What `attention` must know of packed documents: made once for all the layers that see the same tokens.

    A document's tokens have a number of their own and lie side by side. Those numbered PREFIX come first, and are seen
    by all that come after them.
    """
    return implementation(document_BT).visibility(document_BT)


def attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTv: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, causal and inside the documents that `visibility` was told of; [B, H, T, v]."""
    if q_BHTd.is_cuda and visible is not None:
        return _DocumentAttention.apply(q_BHTd, k_BKTd, v_BKTv, visible, scale)
    groups = q_BHTd.shape[1] // k_BKTd.shape[1]
    k_BHTd, v_BHTv = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_BKTd, v_BKTv))
    if not q_BHTd.is_cuda:
        return eager.attention(q_BHTd, k_BHTd, v_BHTv, visible, scale)
    # cuDNN's kernel takes values narrower than keys, as MLA has them, and is the fastest on Hopper.
    with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTv, is_causal=True, scale=scale)
