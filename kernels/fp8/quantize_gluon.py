"""`kernels.fp8.quantize` on Hopper, where codes across rows are wanted: no number changes its thread.

A thread holds TALL rows of 4 columns, so that its codes across rows are one store a column and those along rows one
store of 4 bytes a row, 128 a warp. Plain Triton lays a tile out for its loads, transposes the codes byte by byte
through shared memory, and spends more time on that than memory needs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from kernels.fp8.gluon_shim import barrier, copy
from kernels.fp8.quantize import NORM


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b)


@gluon.jit
def _sigmoid(x):
    return gl.fdiv(1.0, 1.0 + gl.exp2(x * -1.4426950408889634))


@gluon.jit
def _scale(largest, POWER_OF_TWO: gl.constexpr):
    scale = gl.maximum(largest, 1e-10) * (1.0 / 448.0)
    if POWER_OF_TWO:
        scale = ((scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & -8388608).to(gl.float32, bitcast=True)
    return scale


@gluon.jit
def _store(
    x, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, block, m, width, stride,
    ALONG: gl.constexpr, ACROSS: gl.constexpr, POWER_OF_TWO: gl.constexpr, INDEX: gl.constexpr,
    by_row: gl.constexpr, by_column: gl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of [m, width], its 128 columns block number `block`; x is in the layout `by_row`."""
    R: gl.constexpr = x.shape[0]
    size = gl.abs(x)
    columns = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, by_row))
    if ACROSS:
        scale = _scale(gl.reduce(size, 0, _larger), POWER_OF_TWO)
        gl.store(across_scales_ptr + row.to(gl.int64) * width + columns, scale, mask=columns < width)
        turned = gl.convert_layout(x * gl.expand_dims(gl.div_rn(1.0, scale), 0), by_column)
        down = row * R + gl.arange(0, R, layout=gl.SliceLayout(1, by_column))
        along = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, by_column))
        offsets = gl.expand_dims(along.to(INDEX) * stride, 0) + gl.expand_dims(down, 1)
        inside = gl.expand_dims(along < width, 0) & gl.expand_dims(down < stride, 1)
        gl.store(across_ptr + offsets, turned.to(across_ptr.dtype.element_ty), mask=inside)
    if ALONG:
        rows = row * R + gl.arange(0, R, layout=gl.SliceLayout(1, by_row))
        scale = _scale(gl.reduce(size, 1, _larger), POWER_OF_TWO)
        codes = (x * gl.expand_dims(gl.div_rn(1.0, scale), 1)).to(codes_ptr.dtype.element_ty)
        inside = gl.expand_dims(rows < m, 1) & gl.expand_dims(columns < width, 0)
        gl.store(codes_ptr + gl.expand_dims(rows.to(INDEX) * width, 1) + gl.expand_dims(columns, 0), codes, mask=inside)
        gl.store(scales_ptr + block.to(gl.int64) * stride + rows, scale, mask=rows < m)


@gluon.jit
def quantize(
    x_ptr, gate_up_ptr, gates_ptr, source_ptr, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, grad_gates_ptr,
    m, k, x_stride, stride,
    INDEX: gl.constexpr, KIND: gl.constexpr, GATHER: gl.constexpr, GATED: gl.constexpr, ALONG: gl.constexpr,
    ACROSS: gl.constexpr, POWER_OF_TWO: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """`quantize._quantize` of COPY, NORM and SWIGLU."""
    WARPS: gl.constexpr = gl.num_warps()
    by_row: gl.constexpr = gl.BlockedLayout([R // WARPS, 4], [1, 32], [WARPS, 1], [1, 0])
    by_column: gl.constexpr = gl.BlockedLayout([R // WARPS, 4], [1, 32], [WARPS, 1], [0, 1])  # the same threads
    block, row = gl.program_id(0), gl.program_id(1)
    rows = row * R + gl.arange(0, R, layout=gl.SliceLayout(1, by_row))
    columns = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, by_row))
    source = gl.where(rows < m, rows, -1).to(INDEX)
    if GATHER:
        source = gl.load(source_ptr + rows, mask=rows < m, other=-1).to(INDEX)
    inside = gl.expand_dims(source >= 0, 1) & gl.expand_dims(columns < k, 0)
    if KIND <= NORM:  # COPY too
        x = gl.load(x_ptr + gl.expand_dims(source * x_stride, 1) + gl.expand_dims(columns, 0), mask=inside, other=0.0)
        x = x.to(gl.float32)
        if KIND == NORM:
            x *= gl.expand_dims(gl.load(gates_ptr + rows, mask=rows < m, other=0.0), 1)
            x *= gl.expand_dims(gl.load(gate_up_ptr + columns, mask=columns < k, other=0.0).to(gl.float32), 0)
    else:
        offsets = gl.expand_dims(source * (2 * k), 1) + gl.expand_dims(columns, 0)
        opened = gl.load(gate_up_ptr + offsets, mask=inside, other=0.0).to(gl.float32)
        x = gl.load(gate_up_ptr + offsets + k, mask=inside, other=0.0).to(gl.float32)
        x *= opened * _sigmoid(opened)
        if GATED:
            x *= gl.expand_dims(gl.load(gates_ptr + rows, mask=rows < m, other=0.0).to(gl.float32), 1)
    _store(
        x, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, block, m, k, stride,
        ALONG, ACROSS, POWER_OF_TWO, INDEX, by_row, by_column,
    )  # fmt: skip


@gluon.jit
def swiglu_backward_quantize(
    x_ptr, gate_up_ptr, gates_ptr, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, grad_gates_ptr, m, k, stride,
    INDEX: gl.constexpr, GATED: gl.constexpr, POWER_OF_TWO: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """`quantize._quantize` of SWIGLU_BACKWARD, gates and ups by one program. What is read waits in shared memory: in
    registers there is room for one result at a time, if two programs are to share a processor."""
    WARPS: gl.constexpr = gl.num_warps()
    by_row: gl.constexpr = gl.BlockedLayout([R // WARPS, 4], [1, 32], [WARPS, 1], [1, 0])
    by_column: gl.constexpr = gl.BlockedLayout([R // WARPS, 4], [1, 32], [WARPS, 1], [0, 1])
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=1, order=[1, 0])
    buffers = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [3, R, 128], flat)
    block, row = gl.program_id(0), gl.program_id(1)
    rows = row * R + gl.arange(0, R, layout=gl.SliceLayout(1, copied))
    columns = block * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, copied))
    inside = gl.expand_dims(rows < m, 1) & gl.expand_dims(columns < k, 0)
    offsets = gl.expand_dims(rows.to(INDEX) * k, 1) + gl.expand_dims(columns, 0)
    wide = gl.expand_dims(rows.to(INDEX) * (2 * k), 1) + gl.expand_dims(columns, 0)
    copy(buffers.index(0), gate_up_ptr + wide, mask=inside)
    copy(buffers.index(1), gate_up_ptr + wide + k, mask=inside)
    copy(buffers.index(2), x_ptr + offsets, mask=inside)
    async_copy.commit_group()
    rows = row * R + gl.arange(0, R, layout=gl.SliceLayout(1, by_row))
    async_copy.wait_group(0)
    opened = buffers.index(0).load(by_row).to(gl.float32)
    x = buffers.index(2).load(by_row).to(gl.float32) * opened * _sigmoid(opened)
    if GATED:
        part = gl.sum(x * buffers.index(1).load(by_row).to(gl.float32), axis=1)
        gl.store(grad_gates_ptr + block.to(gl.int64) * m + rows, part, mask=rows < m)
        x *= gl.expand_dims(gl.load(gates_ptr + rows, mask=rows < m, other=0.0).to(gl.float32), 1)
    _store(
        x, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, block + k // 128, m, 2 * k, stride,
        True, True, POWER_OF_TWO, INDEX, by_row, by_column,
    )  # fmt: skip
    barrier()  # or the compiler would read once, and keep what it read in registers
    opened = buffers.index(0).load(by_row).to(gl.float32)
    sigmoid = _sigmoid(opened)
    x = sigmoid * (1.0 + opened * (1.0 - sigmoid))
    x *= buffers.index(2).load(by_row).to(gl.float32) * buffers.index(1).load(by_row).to(gl.float32)
    if GATED:
        x *= gl.expand_dims(gl.load(gates_ptr + rows, mask=rows < m, other=0.0).to(gl.float32), 1)
    _store(
        x, codes_ptr, scales_ptr, across_ptr, across_scales_ptr, row, block, m, 2 * k, stride,
        True, True, POWER_OF_TWO, INDEX, by_row, by_column,
    )  # fmt: skip


@gluon.jit
def quantize_weight(
    w_ptr, codes_ptr, scales_ptr, transposed_ptr, transposed_scales_ptr, n, k, POWER_OF_TWO: gl.constexpr
):
    """A block of 128 × 128: its codes, the same transposed, and their one scale."""
    WARPS: gl.constexpr = gl.num_warps()
    by_row: gl.constexpr = gl.BlockedLayout([128 // WARPS, 4], [1, 32], [WARPS, 1], [1, 0])
    by_column: gl.constexpr = gl.BlockedLayout([128 // WARPS, 4], [1, 32], [WARPS, 1], [0, 1])
    column, row, expert = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    rows = row * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, by_row))
    columns = column * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, by_row))
    inside = gl.expand_dims(rows < n, 1) & gl.expand_dims(columns < k, 0)
    offsets = gl.expand_dims(rows * k, 1) + gl.expand_dims(columns, 0)
    w = gl.load(w_ptr + expert * n * k + offsets, mask=inside, other=0.0).to(gl.float32)
    scale = _scale(gl.reduce(gl.reduce(gl.abs(w), 1, _larger), 0, _larger), POWER_OF_TWO)
    w *= gl.div_rn(1.0, scale)
    gl.store(codes_ptr + expert * n * k + offsets, w.to(codes_ptr.dtype.element_ty), mask=inside)
    w = gl.convert_layout(w, by_column)
    rows = row * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, by_column))
    columns = column * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, by_column))
    inside = gl.expand_dims(rows < n, 1) & gl.expand_dims(columns < k, 0)
    offsets = gl.expand_dims(columns * n, 0) + gl.expand_dims(rows, 1)
    gl.store(transposed_ptr + expert * n * k + offsets, w.to(transposed_ptr.dtype.element_ty), mask=inside)
    down, along = gl.cdiv(n, 128), gl.cdiv(k, 128)
    gl.store(scales_ptr + (expert * down + row) * along + column, scale)
    gl.store(transposed_scales_ptr + (expert * along + column) * down + row, scale)
