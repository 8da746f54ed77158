"""dW = dYᵀ X on Hopper, both scaled for each 1 × 128 of the rows summed over: dense, or over the rows of each expert.

As `kernels.fp8.gemm_gluon`, with a scale for each column beside that for each row: twice the arithmetic behind every
product. Its warpgroups take no turns, which was slower here (benchmarks/LOG.md). Letters: N and K as dW is [N, K], M
rows summed over.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.fp8.gemm_gluon import raster
from kernels.fp8.gluon_shim import load


@gluon.jit
def _span(ends_ptr, group, M, GROUPED: gl.constexpr):
    """The blocks of 128 rows that a group sums over: from the first, up to the second."""
    begin, end = 0 * group, gl.cdiv(M, 128) + 0 * group
    if GROUPED:
        begin = gl.load(ends_ptr + group - 1, mask=group > 0, other=0) // 128
        end = gl.load(ends_ptr + group) // 128
    return begin, end


@gluon.jit
def _copy(
    y_desc, x_desc, ys_desc, xs_desc, y_bufs, x_bufs, ys_bufs, xs_bufs, full, empty, ends_ptr, N, K, M, groups,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    rows, columns = gl.cdiv(N, 128), gl.cdiv(K, 128)
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), rows * columns * groups, gl.num_programs(0)):
        group = tile // (rows * columns)
        row, column = raster(tile % (rows * columns), rows, columns, GROUP)
        begin, end = _span(ends_ptr, group, M, GROUPED)
        for block in range(begin, end):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * 128 * 128 + 2 * 128 * 4)
            for half in gl.static_range(2):
                load(y_desc, [row * 128 + 64 * half, block * 128], bar, y_bufs.index(2 * stage + half))
                load(ys_desc, [block, row * 128 + 64 * half], bar, ys_bufs.index(2 * stage + half))
            load(x_desc, [column * 128, block * 128], bar, x_bufs.index(stage))
            load(xs_desc, [block, column * 128], bar, xs_bufs.index(stage))
            step += 1


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, w_ptr, y_bufs, x_bufs, ys_bufs, xs_bufs, full, empty, ends_ptr, N, K, M, groups,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    rows, columns = gl.cdiv(N, 128), gl.cdiv(K, 128)
    zero = gl.zeros((64, 128), gl.float32, mma)
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), rows * columns * groups, gl.num_programs(0)):
        group = tile // (rows * columns)
        row, column = raster(tile % (rows * columns), rows, columns, GROUP)
        begin, end = _span(ends_ptr, group, M, GROUPED)
        acc = zero
        for _ in range(begin, end):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            y, x = y_bufs.index(2 * stage + WARPGROUP), x_bufs.index(stage)
            product = warpgroup_mma(y, x.permute((1, 0)), zero, use_acc=False, is_async=True)
            y_scale = ys_bufs.index(2 * stage + WARPGROUP).reshape([64]).load(by_row)
            x_scale = xs_bufs.index(stage).reshape([128]).load(by_column)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            acc += product * gl.expand_dims(y_scale, 1) * gl.expand_dims(x_scale, 0)
            step += 1
        n = row * 128 + WARPGROUP * 64 + gl.arange(0, 64, layout=by_row)
        k = column * 128 + gl.arange(0, 128, layout=by_column)
        offsets = (group.to(gl.int64) * N + gl.expand_dims(n, 1)) * K + gl.expand_dims(k, 0)
        inside = (gl.expand_dims(n, 1) < N) & (gl.expand_dims(k, 0) < K)
        gl.store(w_ptr + offsets, acc.to(w_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def wgrad(
    y_desc, x_desc, ys_desc, xs_desc, w_ptr, ends_ptr, N, K, M, groups,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [2 * STAGES, 64, 128], y_desc.layout)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 128, 128], x_desc.layout)
    ys_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 64], ys_desc.layout)
    xs_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], xs_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize([
        (_multiply, (
            UPPER, w_ptr, y_bufs, x_bufs, ys_bufs, xs_bufs, full, empty, ends_ptr, N, K, M, groups,
            STAGES, GROUP, GROUPED,
        )),
        (_multiply, (
            LOWER, w_ptr, y_bufs, x_bufs, ys_bufs, xs_bufs, full, empty, ends_ptr, N, K, M, groups,
            STAGES, GROUP, GROUPED,
        )),
        (_copy, (
            y_desc, x_desc, ys_desc, xs_desc, y_bufs, x_bufs, ys_bufs, xs_bufs, full, empty, ends_ptr, N, K, M, groups,
            STAGES, GROUP, GROUPED,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
