"""The same operations with their backward passes written out: fewer passes over memory, nothing saved twice.

Tape autograd through the reference keeps every intermediate and walks memory once per elementary step, which on a
CPU costs more than the matrix products of a small model. Letters as in `kernels.reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import inference


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_ND = x_ND.float()
        rstd_N1 = (torch.linalg.vector_norm(x32_ND, dim=-1, keepdim=True).square() / x_ND.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return (x32_ND * rstd_N1).mul_(weight_D).to(x_ND.dtype)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        width = x_ND.shape[-1]
        normal_ND = x_ND.float() * rstd_N1
        grad_ND = grad_ND.float()
        # dx = (g·w − n·mean(g·w·n)) / rms and dw = Σ g·n share the product g·n.
        product_ND = grad_ND * normal_ND
        grad_weight_D = product_ND.reshape(-1, width).sum(0)
        mean_N1 = (product_ND @ weight_D.float()).unsqueeze(-1) / width
        grad_x_ND = (grad_ND * weight_D).addcmul_(normal_ND, mean_N1, value=-1).mul_(rstd_N1)
        return grad_x_ND.to(x_ND.dtype), grad_weight_D.to(weight_D.dtype), None


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if torch.is_inference_mode_enabled():
        return inference.rms_norm(x_ND, weight_D, eps)
    return _RMSNorm.apply(x_ND, weight_D, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_N2F: Tensor, scale_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_N2F, scale_N)
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        y_NF = F.silu(gate_NF).mul_(up_NF)
        return y_NF if scale_N is None else y_NF.mul_(scale_N.to(y_NF.dtype).unsqueeze(-1))

    @staticmethod
    def backward(ctx, grad_NF: Tensor):
        gate_up_N2F, scale_N = ctx.saved_tensors
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        silu_NF = F.silu(gate_NF)
        grad_scale_N = None
        if scale_N is not None:
            grad_scale_N = (silu_NF * up_NF).mul_(grad_NF).sum(-1, dtype=torch.float32).to(scale_N.dtype)
            grad_NF = grad_NF * scale_N.to(grad_NF.dtype).unsqueeze(-1)
        out_N2F = torch.empty_like(gate_up_N2F)
        grad_gate_NF, grad_up_NF = out_N2F.chunk(2, dim=-1)
        torch.mul(grad_NF, silu_NF, out=grad_up_NF)
        torch.ops.aten.silu_backward.grad_input(grad_NF * up_NF, gate_NF, grad_input=grad_gate_NF)
        return out_N2F, grad_scale_N


def swiglu(gate_up_N2F: Tensor, scale_N: Tensor | None = None) -> Tensor:
    """`reference.swiglu`; keeps its input alone and recomputes the rest, as DeepSeek-V3 does (section 3.2.3)."""
    if torch.is_inference_mode_enabled():
        return inference.swiglu(gate_up_N2F, scale_N)
    return _SwiGLU.apply(gate_up_N2F, scale_N)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NR2, sin_NR2)
        return _rotate(x_ND, cos_NR2, sin_NR2)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        cos_NR2, sin_NR2 = ctx.saved_tensors
        return _rotate(grad_ND, cos_NR2, -sin_NR2), None, None


def _rotate(x_ND: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
    y_ND = x_ND.clone()
    half = cos_NR2.shape[-1]
    a, b = x_ND[..., -2 * half : -half], x_ND[..., -half:]
    y_ND[..., -2 * half : -half].mul_(cos_NR2).addcmul_(b, sin_NR2, value=-1)
    y_ND[..., -half:].mul_(cos_NR2).addcmul_(a, sin_NR2)
    return y_ND


def apply_rope(x_ND: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
    """`reference.apply_rope`."""
    if torch.is_inference_mode_enabled():
        return inference.apply_rope(x_ND, cos_NR2, sin_NR2)
    return _Rope.apply(x_ND, cos_NR2, sin_NR2)
