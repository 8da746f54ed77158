"""Launches of the Gluon kernels: descriptors, tiles, grids."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.fp8 import gemm_gluon, wgrad_gluon
from kernels.fp8.formats import BLOCK, Blocks, Rows
from kernels.fused.launch import processors

# Width of a tile, copies in flight (what fits into shared memory), and how fast it is multiplied beside the widest.
TILES = ((256, 3, 1.0), (192, 4, 0.93), (128, 5, 0.89))
WGRAD_STAGES = 6
RASTER = 16  # rows of tiles that are gone down before the next column


def gemm(x: Rows, weight: Blocks, dtype: torch.dtype) -> Tensor:
    """`reference.gemm`."""
    y = torch.empty(len(x.codes), len(weight.codes), dtype=dtype, device=x.codes.device)
    return _gemm(x, weight, y, None, None)


def grouped_gemm(x: Rows, weight: Blocks, expert_T: Tensor, tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.grouped_gemm` of the first `tiles` (int32 [1], on the device) times 128 rows; the others' are not
    written."""
    y = torch.empty(len(x.codes), weight.codes.shape[1], dtype=dtype, device=x.codes.device)
    return _gemm(x, weight, y, expert_T, tiles)


def _gemm(x: Rows, weight: Blocks, y: Tensor, expert_T: Tensor | None, tiles: Tensor | None) -> Tensor:
    (m, n), k = y.shape, x.codes.shape[1]
    if not m:
        return y
    programs = processors(y.device)
    width, stages = _tile(m, n, programs)
    unit = 64 if width == 192 else 128
    rows, columns = triton.cdiv(m, BLOCK), triton.cdiv(n, width)
    gemm_gluon.gemm[(min(rows * columns, programs),)](
        _described(x.codes, 64, 128),
        _described(weight.codes.flatten(0, -2), unit, 128),
        _described(y, 64, unit),
        _described(x.scales, 1, 64),
        weight.scales,
        expert_T,
        tiles,
        m,
        n,
        k,
        TAIL=width - 128,
        UNIT=unit,
        STAGES=stages,
        GROUP=RASTER,
        GROUPED=expert_T is not None,
        DEPTH=max(16, triton.next_power_of_2(triton.cdiv(k, BLOCK))),
        num_warps=4,
    )
    return y


@cache
def _tile(m: int, n: int, programs: int) -> tuple[int, int]:
    """Width and stages of the tile that finishes first: whole waves of tiles over the processors."""

    def cost(tile: tuple[int, int, float]) -> float:
        width, _, speed = tile
        return triton.cdiv(triton.cdiv(m, BLOCK) * triton.cdiv(n, width), programs) * width / speed

    width, stages, _ = min(TILES, key=cost)
    return width, stages


def wgrad(y: Rows, x: Rows, dtype: torch.dtype) -> Tensor:
    """`reference.wgrad`."""
    return _wgrad(y, x, torch.empty(1, len(y.codes), len(x.codes), dtype=dtype, device=y.codes.device), None)[0]


def grouped_wgrad(y: Rows, x: Rows, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.grouped_wgrad`."""
    shape = (len(ends_E), len(y.codes), len(x.codes))
    return _wgrad(y, x, torch.empty(shape, dtype=dtype, device=y.codes.device), ends_E)


def _wgrad(y: Rows, x: Rows, w: Tensor, ends_E: Tensor | None) -> Tensor:
    groups, n, k = w.shape
    tiles = triton.cdiv(n, BLOCK) * triton.cdiv(k, BLOCK) * groups
    wgrad_gluon.wgrad[(min(tiles, processors(w.device)),)](
        _described(y.codes, 64, 128),
        _described(x.codes, 128, 128),
        _described(y.scales, 1, 64),
        _described(x.scales, 1, 128),
        w,
        ends_E,
        n,
        k,
        y.codes.shape[1],
        groups,
        STAGES=WGRAD_STAGES,
        GROUP=8,
        GROUPED=ends_E is not None,
        num_warps=4,
    )
    return w


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x for the copy engine, in boxes of [rows, columns]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], _layout(8 * x.element_size()))


@cache
def _layout(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=0 if bits == 32 else 128, element_bitwidth=bits, rank=2)
