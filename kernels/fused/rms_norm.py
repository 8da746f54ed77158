"""RMSNorm, alone or of a sum that it makes, and the gradient. Letters: N rows, D width, R rows of a tile, G programs of
the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import as_rows, processors, rows_per_program


@triton.jit
def _rms_norm(
    x_ptr, added_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, n, d, eps,
    ADD: tl.constexpr, NORM: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of x or, with ADD, of x + added, which is written too. Without NORM what each row is multiplied by, alone."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, D)
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    offsets = rows[:, None].to(tl.int64) * d + columns[None, :]
    x_RD = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADD:  # rounded, as what is normalised is what the next layer reads
        added_RD = tl.load(added_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        sum_RD = (x_RD + added_RD).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, sum_RD, mask=inside)
        x_RD = sum_RD.to(tl.float32)
    rstd_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / d + eps)
    if NORM:
        weight_D = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
        y_RD = x_RD * rstd_R[:, None] * weight_D[None, :]
        tl.store(y_ptr + offsets, y_RD.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows, rstd_R, mask=rows < n)


@triton.jit
def _rows_of_backward(grad_ptr, x_ptr, rstd_ptr, grad_sum_ptr, rows, columns, n, d, ADD: tl.constexpr):
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    offsets = rows[:, None].to(tl.int64) * d + columns[None, :]
    grad_RD = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
    x_RD = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    grad_sum_RD = grad_RD
    if ADD:
        grad_sum_RD = tl.load(grad_sum_ptr + offsets, mask=inside, other=0.0)
    return grad_RD, x_RD, tl.load(rstd_ptr + rows, mask=rows < n, other=0.0), grad_sum_RD


@triton.jit
def _rms_norm_backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, grad_sum_ptr, grad_x_ptr, partial_ptr, n, d, tiles,
    ADD: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A program a processor, whose registers hold the gain and its gradient; the next tile is on its way meanwhile."""
    columns = tl.arange(0, D)
    weight_D = tl.load(weight_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    grad_weight_D = tl.zeros((D,), tl.float32)
    rows, step = tl.program_id(0) * R + tl.arange(0, R), tl.num_programs(0) * R
    next_grad_RD, next_x_RD, next_rstd_R, next_grad_sum_RD = _rows_of_backward(
        grad_ptr, x_ptr, rstd_ptr, grad_sum_ptr, rows, columns, n, d, ADD
    )
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        grad_RD, x_RD, rstd_R = next_grad_RD.to(tl.float32), next_x_RD.to(tl.float32), next_rstd_R
        grad_sum_RD = next_grad_sum_RD
        next_grad_RD, next_x_RD, next_rstd_R, next_grad_sum_RD = _rows_of_backward(
            grad_ptr, x_ptr, rstd_ptr, grad_sum_ptr, rows + step, columns, n, d, ADD
        )
        normal_RD = x_RD * rstd_R[:, None]
        grad_weight_D += tl.sum(grad_RD * normal_RD, axis=0)
        grad_RD = grad_RD * weight_D[None, :]
        mean_R = tl.sum(grad_RD * normal_RD, axis=1) / d
        grad_x_RD = ((grad_RD - normal_RD * mean_R[:, None]) * rstd_R[:, None]).to(grad_x_ptr.dtype.element_ty)
        if ADD:  # after the rounding: the bits of a sum of two gradients
            grad_x_RD = (grad_x_RD.to(tl.float32) + grad_sum_RD.to(tl.float32)).to(grad_x_ptr.dtype.element_ty)
        inside = (rows[:, None] < n) & (columns[None, :] < d)
        offsets = rows[:, None].to(tl.int64) * d + columns[None, :]
        tl.store(grad_x_ptr + offsets, grad_x_RD, mask=inside)
        rows += step
    tl.store(partial_ptr + tl.program_id(0) * d + columns, grad_weight_D, mask=columns < d)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`eager.rms_norm`."""
    _, y, rstd = _launch(x, None, weight_D, eps)
    return y, rstd


def add_rms_norm(x: Tensor, added: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`eager.add_rms_norm`."""
    return _launch(x, added, weight_D, eps)


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """`eager.reciprocal_rms`."""
    return _launch(x, None, None, eps)[2]


def _launch(x: Tensor, added: Tensor | None, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm and the rows' factors; x stands in for what is not asked for."""
    x_ND = as_rows(x)
    n, d = x_ND.shape
    width = triton.next_power_of_2(d)
    rows = rows_per_program(width)
    added_ND = x_ND if added is None else as_rows(added)
    sum_ND = x_ND if added is None else torch.empty_like(x_ND)
    y_ND = x_ND if weight_D is None else torch.empty_like(x_ND)
    rstd_N = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        _rms_norm[(triton.cdiv(n, rows),)](
            x_ND, added_ND, x_ND if weight_D is None else weight_D, sum_ND, y_ND, rstd_N, n, d, eps,
            ADD=added is not None, NORM=weight_D is not None, R=rows, D=width, num_warps=8,
        )  # fmt: skip
    return sum_ND.view(x.shape), y_ND.view(x.shape), rstd_N.view(*x.shape[:-1], 1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`eager.rms_norm_backward`; the gain's gradient is summed program by program, then over programs: same bits."""
    grad_ND, x_ND = as_rows(grad), as_rows(x)
    n, d = x_ND.shape
    width = triton.next_power_of_2(d)
    rows = rows_per_program(width)
    tiles = triton.cdiv(n, rows)
    grid = max(1, min(tiles, processors(x.device)))
    grad_x_ND = torch.empty_like(x_ND)
    partial_GD = torch.empty(grid, d, dtype=torch.float32, device=x.device)
    _rms_norm_backward[(grid,)](
        grad_ND, x_ND, weight_D, rstd, grad_ND if grad_sum is None else as_rows(grad_sum), grad_x_ND, partial_GD,
        n, d, tiles, ADD=grad_sum is not None, R=rows, D=width, num_warps=8,
    )  # fmt: skip
    return grad_x_ND.view(x.shape), partial_GD.sum(0)
