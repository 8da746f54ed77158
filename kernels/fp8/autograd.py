"""Linear layers whose three products are float8, as the model calls them: y = x Wᵀ, its gradient in x and in W.

What is kept for the backward pass is the input's codes, along the rows that the weight's gradient sums over: one byte a
number, and no other precision. SwiGLU's input is kept as it is and its output made again (DeepSeek-V3, section 3.2.3).
Each pass asks for a weight's quantised forms anew (`passes.quantized`). Where no gradient is recorded nothing is kept
(`keep`). Nothing here waits for the device. Letters as in `kernels.fp8.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import implementation
from kernels.fp8 import passes
from kernels.fp8.formats import ALIGNMENT
from kernels.fp8.passes import Order
from kernels.grouped import Permutation


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, power_of_two: bool, keep: bool) -> Tensor:
        y_MN, *kept = passes.linear(x_MK, weight_NK, power_of_two, keep)
        ctx.save_for_backward(*kept)
        # Not saved as tensors are: a hook on those may hand back another object, without the attribute `quantized`.
        ctx.weight, ctx.power_of_two = weight_NK, power_of_two
        return y_MN

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor):
        return *passes.linear_backward(grad_MN, ctx.weight, ctx.saved_tensors, ctx.power_of_two), None, None


def linear(x: Tensor, weight_NK: Tensor, power_of_two: bool = False) -> Tensor:
    """x Wᵀ in x's dtype, [..., N]; N and K multiples of 16."""
    _check_shapes(weight_NK)
    y_MN = _Linear.apply(x.flatten(0, -2), weight_NK, power_of_two, torch.is_grad_enabled())
    return y_MN.unflatten(0, x.shape[:-1])


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, gain_K: Tensor, eps: float, weight_NK: Tensor, power_of_two: bool, keep: bool
    ) -> Tensor:
        y_MN, *kept = passes.norm_linear(x_MK, gain_K, eps, weight_NK, power_of_two, keep)
        ctx.save_for_backward(x_MK, gain_K, *kept)
        ctx.weight, ctx.power_of_two = weight_NK, power_of_two
        return y_MN

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor):
        x_MK, gain_K, rstd_M1, *kept = ctx.saved_tensors
        grad_MK, grad_weight = passes.linear_backward(grad_MN, ctx.weight, kept, ctx.power_of_two)
        grad_MK, grad_gain_K = implementation(x_MK).rms_norm_backward(grad_MK, x_MK, gain_K, rstd_M1)
        return grad_MK, grad_gain_K.to(gain_K.dtype), None, grad_weight, None, None


def norm_linear(x: Tensor, gain_K: Tensor, eps: float, weight_NK: Tensor, power_of_two: bool = False) -> Tensor:
    """`linear` of `kernels.rms_norm`, quantised straight from x: the normalised numbers are neither rounded to x's
    dtype nor written."""
    _check_shapes(weight_NK)
    y_MN = _NormLinear.apply(x.flatten(0, -2), gain_K, eps, weight_NK, power_of_two, torch.is_grad_enabled())
    return y_MN.unflatten(0, x.shape[:-1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gates_NK: Tensor | None,
        order: Order | tuple[()],
        power_of_two: bool,
        keep: bool,
    ) -> Tensor:
        y_ND, *kept = passes.swiglu(x_ND, gate_up, down, gates_NK, order, power_of_two, keep)
        ctx.save_for_backward(*kept)
        ctx.weights, ctx.order, ctx.power_of_two = (gate_up, down), order, power_of_two
        return y_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor):
        made = passes.swiglu_backward(grad_ND, *ctx.weights, ctx.saved_tensors, ctx.order, ctx.power_of_two)
        grad_ND, grad_gate_up, grad_down, *grad_gates = made
        return grad_ND, grad_gate_up, grad_down, grad_gates[0] if grad_gates else None, None, None, None


def swiglu_linear(x: Tensor, gate_up_2FD: Tensor, down_DF: Tensor, power_of_two: bool = False) -> Tensor:
    """down(silu(gate) · up) in x's dtype, where gate_up's rows are [gate, up]."""
    _check_shapes(gate_up_2FD, down_DF)
    keep = torch.is_grad_enabled()
    y_ND = _SwiGLU.apply(x.flatten(0, -2), gate_up_2FD, down_DF, None, (), power_of_two, keep)
    return y_ND.unflatten(0, x.shape[:-1])


def experts(
    x_ND: Tensor,
    gates_NK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    order: Permutation,
    power_of_two: bool = False,
) -> Tensor:
    """Σ_k gate_k · expert_k(x), [N, D] in x's dtype; `order` is `kernels.grouped.layout` in tiles of 128."""
    _check_shapes(gate_up_E2FD, down_EDF)
    keep = torch.is_grad_enabled()
    return _SwiGLU.apply(x_ND, gate_up_E2FD, down_EDF, gates_NK, Order.of(order), power_of_two, keep)


def _check_shapes(*weights: Tensor) -> None:
    for weight in weights:
        n, k = weight.shape[-2:]
        if n % ALIGNMENT or k % ALIGNMENT:
            raise ValueError(f"weight [{n}, {k}]: a float8 product wants both a multiple of {ALIGNMENT}")
