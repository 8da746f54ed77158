"""Quantisation in one pass over memory, alone or behind what makes the numbers: a gather, SwiGLU, SwiGLU's gradient.

A program holds 128 × 128 numbers, so it has whole blocks of rows and of columns at once and writes the codes of both
(`_store`); a training step needs both of every operand but a weight. Letters as in `kernels.fp8.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.cast import e4m3, scale_of
from kernels.fp8.formats import ALIGNMENT, BLOCK, FLOAT8, Blocks, Rows, Weight
from kernels.fused.swiglu import swiglu_backward

WARPS = 4  # with 8, bandwidth falls by a quarter: fewer bytes in flight a thread


@triton.jit
def _store(
    x_BB, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, column, m, k, stride,
    ROWS: tl.constexpr, ACROSS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Codes and scales of the block at (128·row, 128·column) of [m, k], along its rows and along its columns. `stride`
    is m, padded: what is contiguous in m begins that far apart."""
    rows, columns = row * 128 + tl.arange(0, 128), column * 128 + tl.arange(0, 128)
    size_BB = tl.abs(x_BB)
    if ROWS:
        scale_B = scale_of(tl.max(size_BB, axis=1), POWER_OF_TWO)
        inside = (rows < m)[:, None] & (columns < k)[None, :]
        codes_BB = e4m3(x_BB / scale_B[:, None])
        tl.store(codes_ptr + rows.to(tl.int64)[:, None] * k + columns[None, :], codes_BB, mask=inside)
        tl.store(scales_ptr + column.to(tl.int64) * stride + rows, scale_B, mask=rows < m)
    if ACROSS:
        scale_B = scale_of(tl.max(size_BB, axis=0), POWER_OF_TWO)
        # The padding of a row of codes is written too, with the zeros that stand beyond the last row.
        inside = (columns < k)[:, None] & (rows < stride)[None, :]
        codes_BB = tl.trans(e4m3(x_BB / scale_B[None, :]))
        offsets = columns.to(tl.int64)[:, None] * stride + rows[None, :]
        tl.store(across_ptr + offsets, codes_BB, mask=inside)
        tl.store(across_scales_ptr + row.to(tl.int64) * k + columns, scale_B, mask=columns < k)


@triton.jit
def _quantize(
    x_ptr, source_ptr, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, m, k, x_stride, stride,
    GATHER: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1)
    rows, columns = row * 128 + tl.arange(0, 128), column * 128 + tl.arange(0, 128)
    inside = (rows < m)[:, None] & (columns < k)[None, :]
    source = rows.to(tl.int64)
    if GATHER:
        source = tl.load(source_ptr + rows, mask=rows < m, other=-1).to(tl.int64)
        inside = inside & (source >= 0)[:, None]
    x_BB = tl.load(x_ptr + source[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    _store(
        x_BB, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, column, m, k, stride,
        ROWS, ACROSS, POWER_OF_TWO,
    )  # fmt: skip


@triton.jit
def _swiglu(
    gate_up_ptr, gate_ptr, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, m, f, stride,
    GATED: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1)
    rows, columns = row * 128 + tl.arange(0, 128), column * 128 + tl.arange(0, 128)
    inside = (rows < m)[:, None] & (columns < f)[None, :]
    offsets = rows.to(tl.int64)[:, None] * (2 * f) + columns[None, :]
    gate_BB = tl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up_BB = tl.load(gate_up_ptr + offsets + f, mask=inside, other=0.0).to(tl.float32)
    y_BB = gate_BB * tl.sigmoid(gate_BB) * up_BB
    if GATED:
        y_BB *= tl.load(gate_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    _store(
        y_BB, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, column, m, f, stride,
        ROWS, ACROSS, POWER_OF_TWO,
    )  # fmt: skip


@triton.jit
def _swiglu_backward(
    grad_ptr, gate_up_ptr, gate_ptr, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, grad_gate_ptr,
    m, f, stride, GATED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1)
    rows, columns = row * 128 + tl.arange(0, 128), column * 128 + tl.arange(0, 128)
    inside = (rows < m)[:, None] & (columns < f)[None, :]
    offsets = rows.to(tl.int64)[:, None] * f + columns[None, :]
    grad_BB = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    offsets += (rows.to(tl.int64) * f)[:, None]
    gate_BB = tl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up_BB = tl.load(gate_up_ptr + offsets + f, mask=inside, other=0.0).to(tl.float32)
    sigmoid_BB = tl.sigmoid(gate_BB)
    silu_BB = gate_BB * sigmoid_BB
    if GATED:
        # One number a row and block: summed over blocks behind the kernel, in their order.
        grad_gate_B = tl.sum(silu_BB * up_BB * grad_BB, axis=1)
        tl.store(grad_gate_ptr + column.to(tl.int64) * m + rows, grad_gate_B, mask=rows < m)
        grad_BB *= tl.load(gate_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)[:, None]
    # [gate, up] is one matrix of width 2f; f is whole blocks, so the second half's begin at f / 128.
    _store(
        grad_BB * up_BB * sigmoid_BB * (1.0 + gate_BB * (1.0 - sigmoid_BB)),
        codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, column, m, 2 * f, stride,
        True, True, POWER_OF_TWO,
    )  # fmt: skip
    _store(
        grad_BB * silu_BB,
        codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, column + f // 128, m, 2 * f, stride,
        True, True, POWER_OF_TWO,
    )  # fmt: skip


@triton.jit
def _quantize_weight(
    w_ptr, codes_ptr, scales_ptr, transposed_ptr, transposed_scales_ptr, n, k, POWER_OF_TWO: tl.constexpr
):
    row, column, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, columns = row * 128 + tl.arange(0, 128), column * 128 + tl.arange(0, 128)
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    offsets = expert * n * k + rows.to(tl.int64)[:, None] * k + columns[None, :]
    w_BB = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(w_BB), axis=1), axis=0), POWER_OF_TWO)
    codes_BB = e4m3(w_BB / scale)
    tl.store(codes_ptr + offsets, codes_BB, mask=inside)
    offsets = expert * n * k + columns.to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(transposed_ptr + offsets, tl.trans(codes_BB), mask=(columns < k)[:, None] & (rows < n)[None, :])
    down, along = tl.cdiv(n, 128), tl.cdiv(k, 128)
    tl.store(scales_ptr + (expert * down + row) * along + column, scale)
    tl.store(transposed_scales_ptr + (expert * along + column) * down + row, scale)


def quantize(
    x_NK: Tensor,
    source_P: Tensor | None = None,
    rows: bool = True,
    across: bool = True,
    power_of_two: bool = False,
) -> tuple[Rows | None, Rows | None]:
    """`reference.quantize`, in one pass over x."""
    x_NK = x_NK if x_NK.stride(1) == 1 else x_NK.contiguous()
    m, k = len(x_NK) if source_P is None else len(source_P), x_NK.shape[1]
    out = _Output(m, k, x_NK.device, rows, across)
    _quantize[out.grid](
        x_NK, source_P, *out.pointers, m, k, x_NK.stride(0), out.stride,
        GATHER=source_P is not None, ROWS=rows, ACROSS=across, POWER_OF_TWO=power_of_two, num_warps=WARPS,
    )  # fmt: skip
    return out.rows, out.across


def swiglu_quantize(
    gate_up_P2F: Tensor, gates_P: Tensor | None, rows: bool = True, across: bool = True, power_of_two: bool = False
) -> tuple[Rows | None, Rows | None]:
    """`reference.swiglu_quantize`; the numbers themselves are never written."""
    m, f = gate_up_P2F.shape[0], gate_up_P2F.shape[1] // 2
    out = _Output(m, f, gate_up_P2F.device, rows, across)
    _swiglu[out.grid](
        gate_up_P2F, gates_P, *out.pointers, m, f, out.stride,
        GATED=gates_P is not None, ROWS=rows, ACROSS=across, POWER_OF_TWO=power_of_two, num_warps=WARPS,
    )  # fmt: skip
    return out.rows, out.across


def swiglu_backward_quantize(
    grad_PF: Tensor, gate_up_P2F: Tensor, gates_P: Tensor | None, power_of_two: bool = False
) -> tuple[Rows, Rows, Tensor | None]:
    """`reference.swiglu_backward_quantize`."""
    m, f = grad_PF.shape
    if f % BLOCK:  # a block would hold numbers of both
        grad_P2F, grad_gates_P = swiglu_backward(grad_PF, gate_up_P2F, gates_P)
        rows, across = quantize(grad_P2F, power_of_two=power_of_two)
        assert rows is not None and across is not None
        return rows, across, grad_gates_P
    out = _Output(m, 2 * f, grad_PF.device, True, True)
    grad_gates_kP = None if gates_P is None else torch.empty(f // BLOCK, m, device=grad_PF.device)
    _swiglu_backward[(triton.cdiv(m, BLOCK), f // BLOCK)](
        grad_PF, gate_up_P2F, gates_P, *out.pointers, grad_gates_kP, m, f, out.stride,
        GATED=gates_P is not None, POWER_OF_TWO=power_of_two, num_warps=WARPS,
    )  # fmt: skip
    assert out.rows is not None and out.across is not None
    return out.rows, out.across, None if grad_gates_kP is None else grad_gates_kP.sum(0)


def quantize_weight(weight: Tensor, power_of_two: bool = False) -> Weight:
    """`reference.quantize_weight`, the weight read once."""
    *experts, n, k = weight.shape
    weight = weight.contiguous()
    down, along = triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK)
    device = weight.device
    codes, transposed = (torch.empty(*experts, *shape, dtype=FLOAT8, device=device) for shape in ((n, k), (k, n)))
    scales, transposed_scales = (torch.empty(*experts, *s, device=device) for s in ((down, along), (along, down)))
    _quantize_weight[(down, along, experts[0] if experts else 1)](
        weight, codes, scales, transposed, transposed_scales, n, k, POWER_OF_TWO=power_of_two, num_warps=WARPS
    )
    return Weight(Blocks(codes, scales), Blocks(transposed, transposed_scales))


class _Output:
    """Room for the codes of [m, k] along rows, across them, or both."""

    def __init__(self, m: int, k: int, device: torch.device, rows: bool, across: bool) -> None:
        down, along = triton.cdiv(m, BLOCK), triton.cdiv(k, BLOCK)
        self.grid = (down, along)
        self.stride = triton.cdiv(m, ALIGNMENT) * ALIGNMENT
        self.rows = self.across = None
        wide = None
        if rows:
            scales = torch.empty(along, self.stride, device=device)
            self.rows = Rows(torch.empty(m, k, dtype=FLOAT8, device=device), scales[:, :m])
        if across:
            wide = torch.empty(k, self.stride, dtype=FLOAT8, device=device)
            self.across = Rows(wide[:, :m], torch.empty(down, k, device=device))
        self.pointers = (
            *(self.rows or (None, None)),
            wide,
            None if self.across is None else self.across.scales,
        )
