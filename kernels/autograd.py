"""The operations as the model calls them: differentiable, each device with its own implementation.

Letters as in `kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import inference
from kernels.dispatch import implementation
from kernels.reference import RoutingRule


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, rstd = implementation(x).rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, rstd)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight_D, rstd = ctx.saved_tensors
        grad_x, grad_weight_D = implementation(x).rms_norm_backward(grad, x, weight_D, rstd)
        return grad_x, grad_weight_D.to(weight_D.dtype), None


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if inference.suits(x_ND):
        return inference.rms_norm(x_ND, weight_D, eps)
    return _RMSNorm.apply(x_ND, weight_D, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, added: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, y, rstd = implementation(x).add_rms_norm(x, added, weight_D, eps)
        ctx.save_for_backward(total, weight_D, rstd)
        return total, y

    @staticmethod
    def backward(ctx, grad_total: Tensor, grad: Tensor):
        total, weight_D, rstd = ctx.saved_tensors
        grad_x, grad_weight_D = implementation(total).rms_norm_backward(grad, total, weight_D, rstd, grad_total)
        return grad_x, grad_x, grad_weight_D.to(weight_D.dtype), None


def add_rms_norm(x_ND: Tensor, added_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and `reference.rms_norm` of it: the residual stream behind a layer, and what the next one reads."""
    if inference.suits(x_ND):
        total_ND = x_ND + added_ND
        return total_ND, inference.rms_norm(total_ND, weight_D, eps)
    return _AddRMSNorm.apply(x_ND, added_ND, weight_D, eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_N2F: Tensor, scale_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_N2F, scale_N)
        return implementation(gate_up_N2F).swiglu(gate_up_N2F, scale_N)

    @staticmethod
    def backward(ctx, grad_NF: Tensor):
        gate_up_N2F, scale_N = ctx.saved_tensors
        return implementation(gate_up_N2F).swiglu_backward(grad_NF, gate_up_N2F, scale_N)


def swiglu(gate_up_N2F: Tensor, scale_N: Tensor | None = None) -> Tensor:
    """`reference.swiglu`; keeps its input alone and recomputes the rest, as DeepSeek-V3 does (section 3.2.3)."""
    if inference.suits(gate_up_N2F):
        return inference.swiglu(gate_up_N2F, scale_N)
    return _SwiGLU.apply(gate_up_N2F, scale_N)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NR2, sin_NR2)
        return implementation(x_ND).rotate(x_ND, cos_NR2, sin_NR2)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        return implementation(grad_ND).rotate(grad_ND, *ctx.saved_tensors, inverse=True), None, None


def apply_rope(x_ND: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
    """`reference.apply_rope`."""
    if inference.suits(x_ND):
        return inference.apply_rope(x_ND, cos_NR2, sin_NR2)
    return _Rope.apply(x_ND, cos_NR2, sin_NR2)


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, up: Tensor, rope: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        ctx.rotary = rope.shape[-1]
        return implementation(up).assemble_keys(up, rope, nope), up[..., nope:]

    @staticmethod
    def backward(ctx, grad_key: Tensor, grad_value: Tensor):
        return *implementation(grad_key).assemble_keys_backward(grad_key, grad_value, ctx.rotary), None


def keys_and_values(up: Tensor, rope: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """`reference.keys_and_values`; the values are a view of `up`, and its gradient is written once, not summed."""
    return _KeysAndValues.apply(up, rope, nope)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NE: Tensor, bias_E: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
        gates_NK, indices_NK, scores_NE = implementation(logits_NE).route(logits_NE, bias_E, rule)
        ctx.save_for_backward(scores_NE, indices_NK)
        ctx.rule = rule
        ctx.mark_non_differentiable(indices_NK)
        ctx.set_materialize_grads(False)
        return gates_NK, indices_NK, scores_NE

    @staticmethod
    def backward(ctx, grad_gates_NK: Tensor | None, _, grad_scores_NE: Tensor | None):
        scores_NE, indices_NK = ctx.saved_tensors
        if grad_gates_NK is None:
            grad_gates_NK = scores_NE.new_zeros(indices_NK.shape)
        backward = implementation(scores_NE).route_backward
        return backward(grad_gates_NK, grad_scores_NE, scores_NE, indices_NK, ctx.rule), None, None


def route(logits_NE: Tensor, bias_E: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.route`; nothing flows through the choice, and the affinities alone are kept."""
    if inference.suits(logits_NE):
        return implementation(logits_NE).route(logits_NE, bias_E, rule)
    return _Route.apply(logits_NE, bias_E, rule)
