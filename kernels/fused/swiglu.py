"""SwiGLU with an optional factor for each row, and its gradient. Letters: N rows, F width of the result, R rows and
C columns of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import as_rows

ROWS, COLUMNS = 4, 512


@triton.jit
def _swiglu(gate_up_ptr, scale_ptr, y_ptr, n, f, SCALED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    rows = tl.program_id(0) * R + tl.arange(0, R)
    base = rows[:, None].to(tl.int64) * f
    if SCALED:
        scale_R = tl.load(scale_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
    for start in range(0, f, C):
        columns = start + tl.arange(0, C)
        inside = (rows[:, None] < n) & (columns[None, :] < f)
        gate_RC = tl.load(gate_up_ptr + 2 * base + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        up_RC = tl.load(gate_up_ptr + 2 * base + f + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        y_RC = gate_RC * tl.sigmoid(gate_RC) * up_RC
        if SCALED:
            y_RC = y_RC * scale_R[:, None]
        tl.store(y_ptr + base + columns[None, :], y_RC.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad_ptr, gate_up_ptr, scale_ptr, out_ptr, grad_scale_ptr, n, f,
    SCALED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    base = rows[:, None].to(tl.int64) * f
    if SCALED:
        scale_R = tl.load(scale_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
        grad_scale_R = tl.zeros((R,), tl.float32)
    for start in range(0, f, C):
        columns = start + tl.arange(0, C)
        inside = (rows[:, None] < n) & (columns[None, :] < f)
        grad_RC = tl.load(grad_ptr + base + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        gate_RC = tl.load(gate_up_ptr + 2 * base + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        up_RC = tl.load(gate_up_ptr + 2 * base + f + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid_RC = tl.sigmoid(gate_RC)
        silu_RC = gate_RC * sigmoid_RC
        if SCALED:
            grad_scale_R += tl.sum(silu_RC * up_RC * grad_RC, axis=1)
            grad_RC = grad_RC * scale_R[:, None]
        grad_gate_RC = grad_RC * up_RC * sigmoid_RC * (1.0 + gate_RC * (1.0 - sigmoid_RC))
        grad_up_RC = grad_RC * silu_RC
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + 2 * base + columns[None, :], grad_gate_RC.to(dtype), mask=inside)
        tl.store(out_ptr + 2 * base + f + columns[None, :], grad_up_RC.to(dtype), mask=inside)
    if SCALED:
        tl.store(grad_scale_ptr + rows, grad_scale_R, mask=rows < n)


def swiglu(gate_up: Tensor, scale_N: Tensor | None = None) -> Tensor:
    """`eager.swiglu`."""
    gate_up_N2F = as_rows(gate_up)
    n, f = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    y_NF = gate_up.new_empty(n, f)
    scale_N = None if scale_N is None else scale_N.contiguous()
    if n:
        grid = (triton.cdiv(n, ROWS),)
        _swiglu[grid](gate_up_N2F, scale_N, y_NF, n, f, SCALED=scale_N is not None, R=ROWS, C=COLUMNS)
    return y_NF.view(*gate_up.shape[:-1], f)


def swiglu_backward(grad: Tensor, gate_up: Tensor, scale_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`eager.swiglu_backward`."""
    grad_NF, gate_up_N2F = as_rows(grad), as_rows(gate_up)
    n, f = grad_NF.shape
    out_N2F = torch.empty_like(gate_up_N2F)
    scale_N = None if scale_N is None else scale_N.contiguous()
    grad_scale_N = None if scale_N is None else torch.empty_like(scale_N, dtype=torch.float32)
    if n:
        grid = (triton.cdiv(n, ROWS),)
        _swiglu_backward[grid](
            grad_NF, gate_up_N2F, scale_N, out_N2F, grad_scale_N, n, f, SCALED=scale_N is not None, R=ROWS, C=COLUMNS
        )
    grad_scale = None if grad_scale_N is None or scale_N is None else grad_scale_N.to(scale_N.dtype)
    return out_N2F.view(gate_up.shape), grad_scale
