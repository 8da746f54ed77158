"""The forward and backward passes of float8 layers on tensors alone, each one step to autograd and to `torch.compile`.

A compiler cannot look into a pass, which launches kernels through descriptors and remembers quantised weights. So each
is an operator too (`fathom::fp8_…`), opaque, and its fake says what it returns. An eager program calls the function
itself: the dispatcher would take some 25 microseconds more of the host's time. Letters as in `kernels.fp8.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import implementation
from kernels.fp8.dispatch import products, quantizer
from kernels.fp8.formats import ALIGNMENT, BLOCK, FLOAT8, Blocks, Rows, Weight
from kernels.grouped import Permutation

Pass = Callable[..., list[Tensor]]


def quantized(weight: Tensor) -> Weight:
    """The forms of a weight: by its attribute `quantized`, where its owner keeps them, or made for this pass alone.

    A weight that FSDP2 gathers is a parameter of FSDP2's own, without the attribute. Rightly so: it gets new numbers in
    the same memory with its version unchanged, and what is made of them should be gone when they are.
    """
    keeper = getattr(weight, "quantized", None)
    return quantizer(weight.device).quantize_weight(weight.detach()) if keeper is None else keeper(weight)


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


class _Products:
    """The products of one expert's layer, or of many experts' rows in an order."""

    def __init__(self, device: torch.device, order: Sequence[Tensor]) -> None:
        self._module, self._order = products(device), Order(*order) if order else None
        self.source_P = None if self._order is None else self._order.source_P

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


def _traceable(fake: Pass) -> Callable[[Pass], Pass]:
    """Makes a pass an operator in traced programs; `fake` returns tensors of the same shapes, strides and dtypes."""

    def wrap(function: Pass) -> Pass:
        # The tag: a recorded CUDA graph would go on with the forms that a weight had then.
        name, tags = f"fathom::fp8_{function.__name__}", (torch.Tag.cudagraph_unsafe,)
        operator = torch.library.custom_op(name, function, mutates_args=(), tags=tags)
        operator.register_fake(fake)

        @wraps(function)
        def either(*inputs: Any) -> list[Tensor]:
            return operator(*inputs) if torch.compiler.is_compiling() else function(*inputs)

        return either

    return wrap


def _fake_across(x: Tensor, m: int, k: int) -> Rows:
    """As `quantize_across` returns of [m, k]."""
    wide = x.new_empty(k, -(-m // ALIGNMENT) * ALIGNMENT, dtype=FLOAT8)
    return Rows(wide[:, :m], x.new_empty(-(-m // BLOCK), k, dtype=torch.float32))


def _fake_linear(x_MK: Tensor, weight_NK: Tensor, power_of_two: bool, keep: bool) -> list[Tensor]:
    return [x_MK.new_empty(len(x_MK), len(weight_NK)), *(_fake_across(x_MK, *x_MK.shape) if keep else ())]


@_traceable(_fake_linear)
def linear(x_MK: Tensor, weight_NK: Tensor, power_of_two: bool, keep: bool) -> list[Tensor]:
    """x Wᵀ in x's dtype; with `keep` also what the backward pass reads, x's codes and scales."""
    rows, across = quantizer(x_MK.device).quantize(x_MK, across=keep, power_of_two=power_of_two)
    return [products(x_MK.device).gemm(rows, quantized(weight_NK).forward, x_MK.dtype), *(across or ())]


def _fake_norm_linear(
    x_MK: Tensor, gain_K: Tensor, eps: float, weight_NK: Tensor, power_of_two: bool, keep: bool
) -> list[Tensor]:
    y_MN, *across = _fake_linear(x_MK, weight_NK, power_of_two, keep)
    return [y_MN, x_MK.new_empty(len(x_MK), 1, dtype=torch.float32), *across] if keep else [y_MN]


@_traceable(_fake_norm_linear)
def norm_linear(
    x_MK: Tensor, gain_K: Tensor, eps: float, weight_NK: Tensor, power_of_two: bool, keep: bool
) -> list[Tensor]:
    """`linear` of RMSNorm(x); with `keep` also the norm's factors [M, 1], then its codes and scales."""
    rstd_M1 = implementation(x_MK).reciprocal_rms(x_MK, eps)
    options = {"across": keep, "power_of_two": power_of_two}
    rows, across = quantizer(x_MK.device).norm_quantize(x_MK, rstd_M1.squeeze(1), gain_K, **options)
    y_MN = products(x_MK.device).gemm(rows, quantized(weight_NK).forward, x_MK.dtype)
    return [y_MN] if across is None else [y_MN, rstd_M1, *across]


def _fake_linear_backward(
    grad_MN: Tensor, weight_NK: Tensor, kept: Sequence[Tensor], power_of_two: bool
) -> list[Tensor]:
    return [grad_MN.new_empty(len(grad_MN), weight_NK.shape[1]), weight_NK.new_empty(weight_NK.shape)]


@_traceable(_fake_linear_backward)
def linear_backward(grad_MN: Tensor, weight_NK: Tensor, kept: Sequence[Tensor], power_of_two: bool) -> list[Tensor]:
    """The gradients of x and of the weight, in its dtype."""
    device = grad_MN.device
    rows, across = quantizer(device).quantize(grad_MN, power_of_two=power_of_two)
    grad_MK = products(device).gemm(rows, quantized(weight_NK).backward, grad_MN.dtype)
    return [grad_MK, products(device).wgrad(across, Rows(*kept), weight_NK.dtype)]


def _fake_swiglu(
    x_ND: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gates_NK: Tensor | None,
    order: Sequence[Tensor],
    power_of_two: bool,
    keep: bool,
) -> list[Tensor]:
    y_ND, p = x_ND.new_empty(len(x_ND), down.shape[-2]), len(order[0]) if order else len(x_ND)
    if not keep:
        return [y_ND]
    gates = () if gates_NK is None else (gates_NK.new_empty(p),)
    return [y_ND, *_fake_across(x_ND, p, x_ND.shape[1]), x_ND.new_empty(p, gate_up.shape[-2]), *gates]


@_traceable(_fake_swiglu)
def swiglu(
    x_ND: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gates_NK: Tensor | None,
    order: Sequence[Tensor],
    power_of_two: bool,
    keep: bool,
) -> list[Tensor]:
    """Σ over a token's experts of gate · down(swiglu(gate_up(x))); with no `Order`, of the one expert there is. With
    `keep` also what the backward pass reads: x's codes and scales, gate_up(x), the gates of the rows if there are any.
    """
    q, p, option = quantizer(x_ND.device), _Products(x_ND.device, order), {"power_of_two": power_of_two}
    gates_P = None if gates_NK is None else _to_rows(gates_NK, Order(*order))
    rows, across = q.quantize(x_ND, p.source_P, across=keep, **option)
    gate_up_P2F = p.gemm(rows, quantized(gate_up).forward, x_ND.dtype)
    rows, _ = q.swiglu_quantize(gate_up_P2F, gates_P, across=False, **option)
    y_ND = p.summed(p.gemm(rows, quantized(down).forward, x_ND.dtype), len(x_ND))
    if across is None:
        return [y_ND]
    return [y_ND, *across, gate_up_P2F, *(() if gates_P is None else (gates_P,))]


def _to_rows(gates_NK: Tensor, order: Order) -> Tensor:
    """The gate of each row, 0 in padding."""
    gates_P = gates_NK.new_zeros(len(order.source_P))
    return gates_P.index_copy_(0, order.row_R, gates_NK.flatten())


def _fake_swiglu_backward(
    grad_ND: Tensor,
    gate_up: Tensor,
    down: Tensor,
    kept: Sequence[Tensor],
    order: Sequence[Tensor],
    power_of_two: bool,
) -> list[Tensor]:
    made = [grad_ND.new_empty(len(grad_ND), gate_up.shape[-1]), *(w.new_empty(w.shape) for w in (gate_up, down))]
    return made + [gates_P.new_empty(len(Order(*order).row_R)).view(len(grad_ND), -1) for gates_P in kept[3:]]


@_traceable(_fake_swiglu_backward)
def swiglu_backward(
    grad_ND: Tensor,
    gate_up: Tensor,
    down: Tensor,
    kept: Sequence[Tensor],
    order: Sequence[Tensor],
    power_of_two: bool,
) -> list[Tensor]:
    """The gradients of x, of the weights in their dtypes, and of the gates if there are any."""
    codes, scales, gate_up_P2F, *gates = kept
    gates_P = gates[0] if gates else None
    q, p, option = quantizer(grad_ND.device), _Products(grad_ND.device, order), {"power_of_two": power_of_two}
    rows, across = q.quantize(grad_ND, p.source_P, **option)
    grad_PF = p.gemm(rows, quantized(down).backward, grad_ND.dtype)
    _, hidden = q.swiglu_quantize(gate_up_P2F, gates_P, rows=False, **option)
    grad_down = p.wgrad(across, hidden, down.dtype)
    rows, across, grad_gates_P = q.swiglu_backward_quantize(grad_PF, gate_up_P2F, gates_P, **option)
    grad_gate_up = p.wgrad(across, Rows(codes, scales), gate_up.dtype)
    grad_PD = p.gemm(rows, quantized(gate_up).backward, grad_ND.dtype)
    made = [p.summed(grad_PD, len(grad_ND)), grad_gate_up, grad_down]
    if grad_gates_P is not None:  # rows of padding may hold anything: they are not read
        made.append(grad_gates_P.index_select(0, Order(*order).row_R).view(len(grad_ND), -1))
    return made
