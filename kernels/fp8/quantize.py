"""Quantisation in one pass over memory, alone or behind what makes the numbers: a gather, RMSNorm, SwiGLU and back.

A training step needs the codes of every operand but a weight twice, along rows and across them, so both are made
at once. Letters as in `kernels.fp8.reference`, and R rows and C columns of what a program holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.cast import e4m3, inverse_of, scale_of
from kernels.fp8.dispatch import is_hopper
from kernels.fp8.formats import ALIGNMENT, BLOCK, FLOAT8, Blocks, Rows, Weight
from kernels.fused.swiglu import swiglu_backward

# Rows of a tile and warps. Codes along rows alone need no more than whole rows of 128.
ALONG, ACROSS = {"R": 32, "num_warps": 4}, {"R": 128, "num_warps": 8}
REGISTERS = 128  # of a thread on Hopper: two programs of 8 warps share a processor

COPY, NORM, SWIGLU, SWIGLU_BACKWARD = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _numbers(x_ptr, gate_up_ptr, source_R, gate_R, columns, k, stride, of_up, KIND: tl.constexpr):
    """What is quantised, fp32 [R, C], and in SWIGLU_BACKWARD each row's part of the gradient of its gate.

    COPY: rows `source_R` of x. NORM: x · the row's gate · the column's gain, which stands where gates and ups would.
    SWIGLU: silu(gate) · up · the row's gate. SWIGLU_BACKWARD: the gradient of the gates, or `of_up` of the ups, where x
    is that of the product.
    """
    inside, part_R = (source_R >= 0)[:, None] & (columns < k)[None, :], gate_R
    if KIND <= NORM:  # COPY too
        x_RC = tl.load(x_ptr + source_R[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if KIND == NORM:
            gain_C = tl.load(gate_up_ptr + columns, mask=columns < k, other=0.0).to(tl.float32)
            x_RC = x_RC * gate_R[:, None] * gain_C[None, :]
    else:
        offsets = source_R[:, None] * (2 * k) + columns[None, :]
        opened_RC = tl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        sigmoid_RC = tl.sigmoid(opened_RC)
        if KIND == SWIGLU:
            x_RC = tl.load(gate_up_ptr + offsets + k, mask=inside, other=0.0).to(tl.float32)
            x_RC *= opened_RC * sigmoid_RC * gate_R[:, None]
        else:
            x_RC = tl.load(x_ptr + source_R[:, None] * k + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if of_up == 0:
                x_RC *= tl.load(gate_up_ptr + offsets + k, mask=inside, other=0.0).to(tl.float32)
                part_R = tl.sum(x_RC * opened_RC * sigmoid_RC, axis=1)
                x_RC *= sigmoid_RC * (1.0 + opened_RC * (1.0 - sigmoid_RC)) * gate_R[:, None]
            else:
                x_RC *= opened_RC * sigmoid_RC * gate_R[:, None]
    return x_RC, part_R


@triton.jit
def _quantize(
    x_ptr, gate_up_ptr, gates_ptr, source_ptr, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, grad_gates_ptr,
    m, k, x_stride, stride,
    INDEX: tl.constexpr, KIND: tl.constexpr, GATHER: tl.constexpr, GATED: tl.constexpr, ALONG: tl.constexpr,
    ACROSS: tl.constexpr, POWER_OF_TWO: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Codes and scales of R rows and 128 columns of [m, k], along the rows, across them, or both; in SWIGLU_BACKWARD of
    [m, 2k], gates and ups by neighbouring programs. `stride` is m, padded: what is contiguous in m begins that far
    apart."""
    column, row, width, of_up = tl.program_id(0), tl.program_id(1), k, 0
    if KIND == SWIGLU_BACKWARD:
        of_up, column, width = column % 2, column // 2, 2 * k
    rows, columns = row * R + tl.arange(0, R), column * 128 + tl.arange(0, 128)
    source_R = tl.where(rows < m, rows, -1).to(INDEX)
    if GATHER:
        source_R = tl.load(source_ptr + rows, mask=rows < m, other=-1).to(INDEX)
    gate_R = tl.full((R,), 1.0, tl.float32)
    if GATED:
        gate_R = tl.load(gates_ptr + rows, mask=rows < m, other=0.0).to(tl.float32)
    x_RC, grad_gate_R = _numbers(x_ptr, gate_up_ptr, source_R, gate_R, columns, k, x_stride, of_up, KIND)
    if KIND == SWIGLU_BACKWARD:  # noqa: SIM102 - the compiler must know this one alone
        if GATED and of_up == 0:
            # One number a row and block: summed over blocks behind the kernel, in their order.
            tl.store(grad_gates_ptr + column.to(tl.int64) * m + rows, grad_gate_R, mask=rows < m)
    out, block, there = columns + of_up * k, column + of_up * (k // 128), columns < k
    if ALONG:
        scale_R = scale_of(tl.max(tl.abs(x_RC), axis=1), POWER_OF_TWO)
        codes_RC = e4m3(x_RC * inverse_of(scale_R)[:, None])
        inside = (rows < m)[:, None] & there[None, :]
        tl.store(codes_ptr + rows.to(INDEX)[:, None] * width + out[None, :], codes_RC, mask=inside)
        tl.store(scales_ptr + block.to(tl.int64) * stride + rows, scale_R, mask=rows < m)
    if ACROSS:
        scale_C = scale_of(tl.max(tl.abs(x_RC), axis=0), POWER_OF_TWO)
        codes_CR = e4m3(tl.trans(x_RC * inverse_of(scale_C)[None, :]))
        # The padding of a row of codes is written too, with the zeros that stand beyond the last row.
        inside = there[:, None] & (rows < stride)[None, :]
        tl.store(across_ptr + out.to(INDEX)[:, None] * stride + rows[None, :], codes_CR, mask=inside)
        tl.store(across_scales_ptr + row.to(tl.int64) * width + out, scale_C, mask=there)


@triton.jit
def _quantize_weight(w_ptr, codes_ptr, scales_ptr, n, k, POWER_OF_TWO: tl.constexpr):
    row, column, expert = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    rows, columns = row * 128 + tl.arange(0, 128), column * 128 + tl.arange(0, 128)
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    offsets = expert * n * k + rows[:, None] * k + columns[None, :]
    w_BB = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(w_BB), axis=1), axis=0), POWER_OF_TWO)
    tl.store(codes_ptr + offsets, e4m3(w_BB * inverse_of(scale)), mask=inside)
    tl.store(scales_ptr + (expert * tl.cdiv(n, 128) + row) * tl.cdiv(k, 128) + column, scale)


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
    return _launch(COPY, m, k, rows, across, power_of_two, x=x_NK, source=source_P)[:2]


def norm_quantize(
    x_MK: Tensor, rstd_M: Tensor, gain_K: Tensor, rows: bool = True, across: bool = True, power_of_two: bool = False
) -> tuple[Rows | None, Rows | None]:
    """`reference.norm_quantize`; the normalised numbers are never written."""
    return _launch(NORM, *x_MK.shape, rows, across, power_of_two, x=x_MK.contiguous(), gate_up=gain_K, gates=rstd_M)[:2]


def swiglu_quantize(
    gate_up_P2F: Tensor, gates_P: Tensor | None, rows: bool = True, across: bool = True, power_of_two: bool = False
) -> tuple[Rows | None, Rows | None]:
    """`reference.swiglu_quantize`; the numbers themselves are never written."""
    m, f = gate_up_P2F.shape[0], gate_up_P2F.shape[1] // 2
    return _launch(SWIGLU, m, f, rows, across, power_of_two, gate_up=gate_up_P2F, gates=gates_P)[:2]


def swiglu_backward_quantize(
    grad_PF: Tensor, gate_up_P2F: Tensor, gates_P: Tensor | None, power_of_two: bool = False
) -> tuple[Rows, Rows, Tensor | None]:
    """`reference.swiglu_backward_quantize`."""
    m, f = grad_PF.shape
    if f % BLOCK:  # a block would hold numbers of both
        grad_P2F, grad_gates_P = swiglu_backward(grad_PF, gate_up_P2F, gates_P)
        return *quantize(grad_P2F, power_of_two=power_of_two), grad_gates_P  # type: ignore[return-value]
    rows, across, grad_gates_kP = _launch(
        SWIGLU_BACKWARD, m, f, True, True, power_of_two, x=grad_PF.contiguous(), gate_up=gate_up_P2F, gates=gates_P
    )
    assert rows is not None and across is not None
    return rows, across, None if grad_gates_kP is None else grad_gates_kP.sum(0)


def _launch(
    kind: tl.constexpr,
    m: int,
    k: int,
    rows: bool,
    across: bool,
    power_of_two: bool,
    x: Tensor | None = None,
    gate_up: Tensor | None = None,
    gates: Tensor | None = None,
    source: Tensor | None = None,
) -> tuple[Rows | None, Rows | None, Tensor | None]:
    """Codes along rows and across them of m rows, and each block's part of the gradient of the gates [k / 128, m]."""
    read = gate_up if x is None else x
    assert read is not None
    tile = ACROSS if across else ALONG
    halves = 2 if kind.value == SWIGLU_BACKWARD.value else 1
    down, blocks, stride = triton.cdiv(m, BLOCK), triton.cdiv(k, BLOCK), triton.cdiv(m, ALIGNMENT) * ALIGNMENT
    there = {"device": read.device}
    most = max(k * halves * stride, *(t.stride(0) * len(t) for t in (x, gate_up) if t is not None))
    along_rows = across_rows = wide = grad_gates = None
    if rows:
        scales = torch.empty(blocks * halves, stride, **there)[:, :m]
        along_rows = Rows(torch.empty(m, k * halves, dtype=FLOAT8, **there), scales)
    if across:
        wide = torch.empty(k * halves, stride, dtype=FLOAT8, **there)
        across_rows = Rows(wide[:, :m], torch.empty(down, k * halves, **there))
    if halves == 2 and gates is not None:
        grad_gates = torch.empty(blocks, m, **there)
    outputs = *(along_rows or (None, None)), wide, None if across_rows is None else across_rows.scales, grad_gates
    options = {"INDEX": tl.int64 if most >= 2**31 else tl.int32, "GATED": gates is not None}
    options |= {"POWER_OF_TWO": power_of_two, **tile}
    kernel, grid = _quantize, (blocks * halves, triton.cdiv(m, tile["R"]))
    if across and is_hopper(read.device):
        from kernels.fp8 import quantize_gluon

        kernel, options["maxnreg"] = quantize_gluon.quantize, REGISTERS
        if halves == 2:
            quantize_gluon.swiglu_backward_quantize[blocks, grid[1]](
                x, gate_up, gates, *outputs, m, k, stride, **options
            )
            return along_rows, across_rows, grad_gates
    kernel[grid](
        x, gate_up, gates, source, *outputs, m, k, 0 if x is None else x.stride(0), stride,
        KIND=kind, GATHER=source is not None, ALONG=rows, ACROSS=across, **options,
    )  # fmt: skip
    return along_rows, across_rows, grad_gates


def quantize_weight(weight: Tensor, power_of_two: bool = False, into: Weight | None = None) -> Weight:
    """`reference.quantize_weight`, the weight read once."""
    *experts, n, k = weight.shape
    weight = weight.contiguous()
    down, along = triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK)
    made = into or Weight(_blocks(weight, experts, n, k), _blocks(weight, experts, k, n))
    (codes, scales), (turned, turned_scales) = made
    grid = along, down, experts[0] if experts else 1
    if is_hopper(weight.device):
        from kernels.fp8 import quantize_gluon

        outputs = codes, scales, turned, turned_scales
        quantize_gluon.quantize_weight[grid](weight, *outputs, n, k, POWER_OF_TWO=power_of_two, num_warps=8)
    else:
        _quantize_weight[grid](weight, codes, scales, n, k, POWER_OF_TWO=power_of_two, num_warps=8)
        turned.view(torch.uint8).copy_(codes.view(torch.uint8).mT)
        turned_scales.copy_(scales.mT)
    return made


def _blocks(weight: Tensor, experts: list[int], n: int, k: int) -> Blocks:
    codes = torch.empty(*experts, n, k, dtype=FLOAT8, device=weight.device)
    scales = torch.empty(*experts, triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK), device=weight.device)
    return Blocks(codes, scales)
