"""Y = X Wᵀ on Hopper, with a scale for each 1 × 128 of X and each 128 × 128 of W: dense, or one W for each 128 rows.

Written in Gluon, for what plain Triton can't say: a warp that only starts copies, two warpgroups that only multiply,
and who of the two may issue next. A product of 128 along K goes to registers of its own and is scaled into the fp32
accumulators from there (DeepSeek-V3, section 3.3.2: the tensor core alone adds with 14 bits). While one warpgroup does
that the other multiplies, if they take turns: left alone they fall into step, multiply both, then add both, and the
tensor core stands still meanwhile. So a warpgroup issues its product when the other has issued its own.

Each warpgroup owns 64 rows of a tile of 128 × (128 + TAIL). Letters: M rows, N and K as in x [M, K] and W [N, K].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.fp8.gluon_shim import load, reinterpret, store


@gluon.jit
def raster(number, rows, columns, GROUP: gl.constexpr):
    """Row and column of a tile: down GROUP rows first, then one column on, so that what is read twice is in L2."""
    first = number // (GROUP * columns) * GROUP
    height = gl.minimum(rows - first, GROUP)
    return first + number % height, number % (GROUP * columns) // height


@gluon.jit
def _parts(column, TAIL: gl.constexpr):
    """Where in a tile its part of 128 columns begins, and where the tail. Neither may cross a scale of W: every second
    tile of 192 has its tail in front."""
    if TAIL == 64:
        part, tail = 64 * (column % 2), 128 - 128 * (column % 2)
    else:
        part, tail = 0 * column, 0 * column + 128
    return part, tail


@gluon.jit
def _copy(
    x_desc, w_desc, s_desc, x_bufs, w_bufs, tail_bufs, s_bufs, full, empty, expert_ptr, count_ptr, M, N, K,
    TAIL: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    rows, columns, depth = gl.cdiv(M, 128), gl.cdiv(N, 128 + TAIL), gl.cdiv(K, 128)
    if GROUPED:
        rows = gl.load(count_ptr)
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        row, column = raster(tile, rows, columns, GROUP)
        part, tail = _parts(column, TAIL)
        m, n = row * 128, column * (128 + TAIL)
        if GROUPED:
            n += gl.load(expert_ptr + row) * N
        for k in range(depth):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 128 * (128 + 128 + TAIL) + 2 * 64 * 4)
            for half in gl.static_range(2):
                load(x_desc, [m + 64 * half, k * 128], bar, x_bufs.index(2 * stage + half))
                load(s_desc, [k, m + 64 * half], bar, s_bufs.index(2 * stage + half))
            for unit in gl.static_range(128 // UNIT):
                load(w_desc, [n + part + unit * UNIT, k * 128], bar, w_bufs.index(stage).slice(unit * UNIT, UNIT))
            if TAIL > 0:
                load(w_desc, [n + tail, k * 128], bar, tail_bufs.index(stage))
            step += 1


@gluon.jit
def _product(x, w, product, turns, GROUP: gl.constexpr, turn):
    """x wᵀ over 128 of K, begun when the other warpgroup has begun its own. `product` is overwritten, yet handed in:
    that keeps the compiler from moving its last use behind this product, where both would need registers."""
    mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (1 - GROUP))
    product = warpgroup_mma(x, w.permute((1, 0)), product, use_acc=False, is_async=True)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _weight_scales(
    tile, rows, columns, w_scales_ptr, expert_ptr, N, depth, k,
    TAIL: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """The scales of a tile's two parts of W, along K; of the last tile where there is no such tile."""
    row, column = raster(gl.minimum(tile, rows * columns - 1), rows, columns, GROUP)
    part, tail = _parts(column, TAIL)
    blocks, n = gl.cdiv(N, 128), column * (128 + TAIL)
    if GROUPED:
        w_scales_ptr += gl.load(expert_ptr + row) * blocks * depth
    inside = k < depth
    at_part = gl.load(w_scales_ptr + gl.minimum((n + part) // 128, blocks - 1) * depth + k, mask=inside, other=0.0)
    at_tail = gl.load(w_scales_ptr + gl.minimum((n + tail) // 128, blocks - 1) * depth + k, mask=inside, other=0.0)
    return at_part, at_tail


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, y_desc, y_buf, y_tail_buf, x_bufs, w_bufs, tail_bufs, s_bufs, t_buf, full, empty, turns,
    w_scales_ptr, expert_ptr, count_ptr, M, N, K,
    TAIL: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
    DEPTH: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = TAIL if TAIL > 0 else 128
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    mma_tail: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32]
    )
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_row_tail: gl.constexpr = gl.SliceLayout(1, mma_tail)
    rows, columns, depth = gl.cdiv(M, 128), gl.cdiv(N, 128 + TAIL), gl.cdiv(K, 128)
    if GROUPED:
        rows = gl.load(count_ptr)
    k_all = gl.arange(0, DEPTH, layout=gl.BlockedLayout([1], [32], [4], [0]))
    t_flat = reinterpret(t_buf, [2 * DEPTH])
    zero = gl.zeros((64, 128), gl.float32, mma)
    zero_tail = gl.zeros((64, WIDTH), gl.float32, mma_tail)
    product, product_tail = zero, zero_tail
    step, turn = gl.to_tensor(0), gl.to_tensor(0)
    at_part, at_tail = _weight_scales(
        gl.program_id(0), rows, columns, w_scales_ptr, expert_ptr, N, depth, k_all, TAIL, GROUP, GROUPED
    )
    for tile in range(gl.program_id(0), rows * columns, gl.num_programs(0)):
        t_flat.slice(0, DEPTH).store(at_part)
        t_flat.slice(DEPTH, DEPTH).store(at_tail)
        # The next tile's scales arrive while this one is multiplied.
        at_part, at_tail = _weight_scales(
            tile + gl.num_programs(0), rows, columns, w_scales_ptr, expert_ptr, N, depth, k_all, TAIL, GROUP, GROUPED
        )
        acc, acc_tail = zero, zero_tail
        for k in range(depth):
            stage = step % STAGES
            w_scale = t_buf.index(k).load(by_row)
            w_scale_tail = t_buf.index(DEPTH + k).load(by_row)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            x_scale = s_bufs.index(2 * stage + WARPGROUP).reshape([64]).load(by_row)
            x = x_bufs.index(2 * stage + WARPGROUP)
            product = _product(x, w_bufs.index(stage), product, turns, WARPGROUP, turn)
            turn += 1
            if TAIL == 0:
                mbarrier.arrive(empty.index(stage), count=1)
            acc += product * gl.expand_dims(x_scale * w_scale, 1)
            if TAIL == 128:
                acc = warpgroup_mma_wait(0, deps=(acc,))  # waits for nothing: keeps the sum in front of the product
                product = _product(x, tail_bufs.index(stage), product, turns, WARPGROUP, turn)
                turn += 1
                mbarrier.arrive(empty.index(stage), count=1)
                acc_tail += product * gl.expand_dims(x_scale * w_scale_tail, 1)
            if TAIL == 64:
                acc = warpgroup_mma_wait(0, deps=(acc,))
                product_tail = _product(x, tail_bufs.index(stage), product_tail, turns, WARPGROUP, turn)
                turn += 1
                mbarrier.arrive(empty.index(stage), count=1)
                scale_tail = gl.convert_layout(x_scale * w_scale_tail, by_row_tail)
                acc_tail += product_tail * gl.expand_dims(scale_tail, 1)
            step += 1
        row, column = raster(tile, rows, columns, GROUP)
        part, tail = _parts(column, TAIL)
        m, n = row * 128 + WARPGROUP * 64, column * (128 + TAIL)
        tma.store_wait(0)
        y_buf.store(acc.to(y_desc.dtype))
        if TAIL > 0:
            y_tail_buf.store(acc_tail.to(y_desc.dtype))
        fence_async_shared()
        for unit in gl.static_range(128 // UNIT):
            store(y_desc, [m, n + part + unit * UNIT], y_buf.slice(unit * UNIT, UNIT, dim=1))
        if TAIL > 0:
            store(y_desc, [m, n + tail], y_tail_buf)
    tma.store_wait(0)


@gluon.jit
def gemm(
    x_desc, w_desc, y_desc, s_desc, w_scales_ptr, expert_ptr, count_ptr, M, N, K,
    TAIL: gl.constexpr, UNIT: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPED: gl.constexpr,
    DEPTH: gl.constexpr,
):  # fmt: skip
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 128, 128], w_desc.layout)
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [2, 64, 128], y_desc.layout)
    if TAIL > 0:
        tail_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, TAIL, 128], w_desc.layout)
        y_tail_bufs = gl.allocate_shared_memory(y_desc.dtype, [2, 64, TAIL], y_desc.layout)
    else:
        tail_bufs, y_tail_bufs = w_bufs, y_bufs
    s_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 64], s_desc.layout)
    t_upper = gl.allocate_shared_memory(gl.float32, [2 * DEPTH, 1], flat)
    t_lower = gl.allocate_shared_memory(gl.float32, [2 * DEPTH, 1], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for warpgroup in gl.static_range(2):
        mbarrier.init(turns.index(warpgroup), count=1)
    fence_async_shared()
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize([
        (_multiply, (
            UPPER, y_desc, y_bufs.index(0), y_tail_bufs.index(0), x_bufs, w_bufs, tail_bufs, s_bufs, t_upper, full,
            empty, turns, w_scales_ptr, expert_ptr, count_ptr, M, N, K, TAIL, UNIT, STAGES, GROUP, GROUPED, DEPTH,
        )),
        (_multiply, (
            LOWER, y_desc, y_bufs.index(1), y_tail_bufs.index(1), x_bufs, w_bufs, tail_bufs, s_bufs, t_lower, full,
            empty, turns, w_scales_ptr, expert_ptr, count_ptr, M, N, K, TAIL, UNIT, STAGES, GROUP, GROUPED, DEPTH,
        )),
        (_copy, (
            x_desc, w_desc, s_desc, x_bufs, w_bufs, tail_bufs, s_bufs, full, empty, expert_ptr, count_ptr, M, N, K,
            TAIL, UNIT, STAGES, GROUP, GROUPED,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
