"""Linear layers whose three products are float8, as the model calls them: y = x Wᵀ, its gradient in x and in W.

What is kept for the backward pass is the input's codes, along the rows that the weight's gradient sums over: one byte a
number, and no other precision. SwiGLU's input is kept as it is and its output made again (DeepSeek-V3, section 3.2.3).
Where no gradient is recorded nothing is kept (`keep`). Nothing here waits for the device. Letters as in
`kernels.fp8.reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import implementation
from kernels.fp8.dispatch import products, quantizer
from kernels.fp8.formats import ALIGNMENT, BLOCK, Blocks, Rows, Weight
from kernels.grouped import Permutation


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, quantized: Weight, power_of_two: bool, keep: bool) -> Tensor:
        rows, across = quantizer(x_MK.device).quantize(x_MK, across=keep, power_of_two=power_of_two)
        ctx.save_for_backward(*(across or ()))
        ctx.quantized, ctx.power_of_two, ctx.dtype = quantized, power_of_two, weight_NK.dtype
        return products(x_MK.device).gemm(rows, quantized.forward, x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor):
        device, x = grad_MN.device, Rows(*ctx.saved_tensors)
        rows, across = quantizer(device).quantize(grad_MN, power_of_two=ctx.power_of_two)
        grad_MK = products(device).gemm(rows, ctx.quantized.backward, grad_MN.dtype)
        return grad_MK, products(device).wgrad(across, x, ctx.dtype), None, None, None


def linear(x: Tensor, weight_NK: Tensor, quantized: Weight, power_of_two: bool = False) -> Tensor:
    """x Wᵀ in x's dtype, [..., N]; `quantized` is the weight's `quantize_weight`, N and K multiples of 16."""
    _check_shapes(weight_NK, quantized)
    y_MN = _Linear.apply(x.flatten(0, -2), weight_NK, quantized, power_of_two, torch.is_grad_enabled())
    return y_MN.unflatten(0, x.shape[:-1])


class Order(NamedTuple):
    """A `Permutation` in tiles of 128 as the products read it. source_P: the token of each row, −1 in padding, int32.
    row_R: the row of each (token, choice). expert_T: the expert of each tile, int32. tiles: how many tiles hold rows,
    int32 [1]. ends_E: where each expert's rows end, int32."""

    source_P: Tensor
    row_R: Tensor
    expert_T: Tensor
    tiles: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, order: Permutation) -> Order:
        assert order.tile == BLOCK, order.tile
        source_P = order.source_P.masked_fill(order.real_P == 0, -1).to(torch.int32)
        return cls(source_P, order.row_R, order.expert_L.to(torch.int32), order.ends_E[-1:] // BLOCK, order.ends_E)


class _SwiGLU(torch.autograd.Function):
    """Σ over a token's experts of gate · down(swiglu(gate_up(x))); without an order, of the one expert there is."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gates_NK: Tensor | None,
        quantized: tuple[Weight, Weight],
        order: Order | None,
        power_of_two: bool,
        keep: bool,
    ) -> Tensor:
        q, p, option = quantizer(x_ND.device), _Products(x_ND.device, order), {"power_of_two": power_of_two}
        gates_P = None if gates_NK is None or order is None else _to_rows(gates_NK, order)
        rows, across = q.quantize(x_ND, p.source_P, across=keep, **option)
        gate_up_P2F = p.gemm(rows, quantized[0].forward, x_ND.dtype)
        rows, _ = q.swiglu_quantize(gate_up_P2F, gates_P, across=False, **option)
        y_PD = p.gemm(rows, quantized[1].forward, x_ND.dtype)
        if across is not None:
            ctx.save_for_backward(*across, gate_up_P2F, gates_P)
        ctx.quantized, ctx.order, ctx.option = quantized, order, option
        ctx.dtypes = gate_up.dtype, down.dtype
        return p.summed(y_PD, len(x_ND))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor):
        *x, gate_up_P2F, gates_P = ctx.saved_tensors
        (up, down), option = ctx.quantized, ctx.option
        q, p = quantizer(grad_ND.device), _Products(grad_ND.device, ctx.order)
        rows, across = q.quantize(grad_ND, p.source_P, **option)
        grad_PF = p.gemm(rows, down.backward, grad_ND.dtype)
        _, hidden = q.swiglu_quantize(gate_up_P2F, gates_P, rows=False, **option)
        grad_down = p.wgrad(across, hidden, ctx.dtypes[1])
        rows, across, grad_gates_P = q.swiglu_backward_quantize(grad_PF, gate_up_P2F, gates_P, **option)
        grad_gate_up = p.wgrad(across, Rows(*x), ctx.dtypes[0])
        grad_PD = p.gemm(rows, up.backward, grad_ND.dtype)
        grad_gates = None
        if grad_gates_P is not None:  # rows of padding may hold anything: they are not read
            grad_gates = grad_gates_P.index_select(0, ctx.order.row_R).view(len(grad_ND), -1)
        return p.summed(grad_PD, len(grad_ND)), grad_gate_up, grad_down, grad_gates, None, None, None, None


class _Products:
    """The products of one expert's layer, or of many experts' rows in an order."""

    def __init__(self, device: torch.device, order: Order | None) -> None:
        self._module, self._order = products(device), order
        self.source_P = None if order is None else order.source_P

    def gemm(self, x: Rows, weight: Blocks, dtype: torch.dtype) -> Tensor:
        if self._order is None:
            return self._module.gemm(x, weight, dtype)
        return self._module.grouped_gemm(x, weight, self._order.expert_T, self._order.tiles, dtype)

    def wgrad(self, y: Rows, x: Rows, dtype: torch.dtype) -> Tensor:
        if self._order is None:
            return self._module.wgrad(y, x, dtype)
        return self._module.grouped_wgrad(y, x, self._order.ends_E, dtype)

    def summed(self, y_PD: Tensor, n_tokens: int) -> Tensor:
        """Σ over the rows of each token."""
        if self._order is None:
            return y_PD
        return implementation(y_PD).gather_sum(y_PD, self._order.row_R, n_tokens)


def _to_rows(gates_NK: Tensor, order: Order) -> Tensor:
    """The gate of each row, 0 in padding."""
    gates_P = gates_NK.new_zeros(len(order.source_P))
    return gates_P.index_copy_(0, order.row_R, gates_NK.flatten())


def swiglu_linear(
    x: Tensor, gate_up_2FD: Tensor, down_DF: Tensor, quantized: tuple[Weight, Weight], power_of_two: bool = False
) -> Tensor:
    """down(silu(gate) · up) in x's dtype, where gate_up's rows are [gate, up]."""
    for weight, form in zip((gate_up_2FD, down_DF), quantized, strict=True):
        _check_shapes(weight, form)
    keep = torch.is_grad_enabled()
    y_ND = _SwiGLU.apply(x.flatten(0, -2), gate_up_2FD, down_DF, None, quantized, None, power_of_two, keep)
    return y_ND.unflatten(0, x.shape[:-1])


def experts(
    x_ND: Tensor,
    gates_NK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    quantized: tuple[Weight, Weight],
    order: Permutation,
    power_of_two: bool = False,
) -> Tensor:
    """Σ_k gate_k · expert_k(x), [N, D] in x's dtype; `order` is `kernels.grouped.layout` in tiles of 128."""
    for weight, form in zip((gate_up_E2FD, down_EDF), quantized, strict=True):
        _check_shapes(weight, form)
    rows, keep = Order.of(order), torch.is_grad_enabled()
    return _SwiGLU.apply(x_ND, gate_up_E2FD, down_EDF, gates_NK, quantized, rows, power_of_two, keep)


def _check_shapes(weight: Tensor, quantized: Weight) -> None:
    n, k = weight.shape[-2:]
    if n % ALIGNMENT or k % ALIGNMENT:
        raise ValueError(f"weight [{n}, {k}]: a float8 product wants both a multiple of {ALIGNMENT}")
    if quantized.forward.codes.shape != weight.shape:
        raise ValueError(f"quantized is of {tuple(quantized.forward.codes.shape)}, the weight {tuple(weight.shape)}")
