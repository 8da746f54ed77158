"""The products in plain Triton: what runs on Ada and Blackwell, and under the interpreter in the CPU tests.

On Hopper `kernels.fp8.hopper` is faster: here all warps wait for every product before they add it up.
Letters as in `kernels.fp8.formats`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8.formats import Blocks, Rows

ROWS, COLUMNS, WARPS, STAGES = 64, 128, 4, 3
RASTER = 8


@triton.jit
def _codes(ptr, rows, n_rows, stride, k, width):
    """Codes of 128 columns from k on; zeros outside."""
    columns = k + tl.arange(0, 128)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _gemm(
    x_ptr, x_scales_ptr, w_ptr, w_scales_ptr, y_ptr, expert_ptr, tiles_ptr, m, n, k, x_stride, x_scales_stride,
    GROUPED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, along = tl.cdiv(m, R), tl.cdiv(n, C)
    first = tl.program_id(0) // (GROUP * along) * GROUP
    height = tl.minimum(down - first, GROUP)
    row = first + tl.program_id(0) % height
    column = tl.program_id(0) % (GROUP * along) // height
    rows, columns = row * R + tl.arange(0, R), column * C + tl.arange(0, C)
    depth = tl.cdiv(k, 128)
    if GROUPED:
        block = row * R // 128
        if block >= tl.load(tiles_ptr):
            return
        expert = tl.load(expert_ptr + block).to(tl.int64)
        w_ptr += expert * n * k
        w_scales_ptr += expert * tl.cdiv(n, 128) * depth
    w_scales_ptr += column * C // 128 * depth
    acc_RC = tl.zeros((R, C), tl.float32)
    for step in range(depth):
        x_RK = _codes(x_ptr, rows, m, x_stride, step * 128, k)
        w_CK = _codes(w_ptr, columns, n, k, step * 128, k)
        scale_R = tl.load(x_scales_ptr + step * x_scales_stride + rows, mask=rows < m, other=0.0)
        acc_RC += tl.dot(x_RK, tl.trans(w_CK)) * (scale_R * tl.load(w_scales_ptr + step))[:, None]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], acc_RC.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _wgrad(
    y_ptr, y_scales_ptr, x_ptr, x_scales_ptr, w_ptr, ends_ptr, n, k, m, y_stride, x_stride, y_scales_stride,
    x_scales_stride, GROUPED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, column, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns = row * R + tl.arange(0, R), column * C + tl.arange(0, C)
    begin, end = 0, tl.cdiv(m, 128)
    if GROUPED:
        begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0) // 128
        end = tl.load(ends_ptr + group) // 128
    acc_RC = tl.zeros((R, C), tl.float32)
    for step in range(begin, end):
        y_RM = _codes(y_ptr, rows, n, y_stride, step * 128, m)
        x_CM = _codes(x_ptr, columns, k, x_stride, step * 128, m)
        y_scale_R = tl.load(y_scales_ptr + step * y_scales_stride + rows, mask=rows < n, other=0.0)
        x_scale_C = tl.load(x_scales_ptr + step * x_scales_stride + columns, mask=columns < k, other=0.0)
        acc_RC += tl.dot(y_RM, tl.trans(x_CM)) * y_scale_R[:, None] * x_scale_C[None, :]
    inside = (rows < n)[:, None] & (columns < k)[None, :]
    offsets = (group.to(tl.int64) * n + rows[:, None]) * k + columns[None, :]
    tl.store(w_ptr + offsets, acc_RC.to(w_ptr.dtype.element_ty), mask=inside)


def gemm(x: Rows, weight: Blocks, dtype: torch.dtype) -> Tensor:
    """`reference.gemm`."""
    return _launch_gemm(x, weight, None, None, dtype)


def grouped_gemm(x: Rows, weight: Blocks, expert_T: Tensor, tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.grouped_gemm` of the first `tiles` times 128 rows."""
    return _launch_gemm(x, weight, expert_T, tiles, dtype)


def _launch_gemm(x: Rows, weight: Blocks, expert_T: Tensor | None, tiles: Tensor | None, dtype: torch.dtype) -> Tensor:
    (m, k), n = x.codes.shape, weight.codes.shape[-2]
    y = torch.empty(m, n, dtype=dtype, device=x.codes.device)
    if m:
        _gemm[(triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS),)](
            x.codes, x.scales, weight.codes, weight.scales, y, expert_T, tiles, m, n, k, x.codes.stride(0),
            x.scales.stride(0), GROUPED=expert_T is not None, R=ROWS, C=COLUMNS, GROUP=RASTER,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y


def wgrad(y: Rows, x: Rows, dtype: torch.dtype) -> Tensor:
    """`reference.wgrad`."""
    return _launch_wgrad(y, x, None, dtype)[0]


def grouped_wgrad(y: Rows, x: Rows, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.grouped_wgrad`."""
    return _launch_wgrad(y, x, ends_E, dtype)


def _launch_wgrad(y: Rows, x: Rows, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    (n, m), k, groups = y.codes.shape, len(x.codes), 1 if ends_E is None else len(ends_E)
    w = torch.empty(groups, n, k, dtype=dtype, device=y.codes.device)
    _wgrad[(triton.cdiv(n, ROWS), triton.cdiv(k, COLUMNS), groups)](
        y.codes, y.scales, x.codes, x.scales, w, ends_E, n, k, m, y.codes.stride(0), x.codes.stride(0),
        y.scales.stride(0), x.scales.stride(0), GROUPED=ends_E is not None, R=ROWS, C=COLUMNS,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return w
