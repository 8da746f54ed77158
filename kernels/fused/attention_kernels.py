"""The kernels of `kernels.fused.attention`: one forward, two backward.

A query i sees the keys j of start_i ≤ j ≤ i and of j < prefix; a key j is seen by the queries i of j ≤ i < end_j. A
program holds one tile of queries (or of keys) and walks over the tiles on the other side that it shares a visible pair
with, in two loops: tiles that are visible as a whole, then those that need a mask. Tiles arrive by TMA, which gives
zeros beyond a row's tokens and beyond a head's width.

Letters: M queries and N keys of a tile; V width of a value, D and E the two parts of a query's and a key's (E may be 0:
192 is 128 + 64, not 256), all but V · padded to powers of two; C any columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.fused.launch import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # not −∞, which less −∞ is NaN: what a row sums up before a visible key, the first erases


@triton.jit
def _tile(desc, rest_desc, batch, head, row, R: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    """R rows of one head, in two parts of D and E columns."""
    x_RD = desc.load([batch, head, row, 0]).reshape(R, D)
    x_RE = rest_desc.load([batch, head, row, D]).reshape(R, E) if E > 0 else x_RD
    return x_RD, x_RE


@triton.jit
def _scores(a_RD, a_RE, b_CD, b_CE, acc_RC, E: tl.constexpr):
    """acc + a bᵀ."""
    acc_RC = dot(a_RD, b_CD.T, acc_RC)
    return dot(a_RE, b_CE.T, acc_RC) if E > 0 else acc_RC


@triton.jit
def _store(ptr, x_RC, rows, n_rows, stride, width, first, R: tl.constexpr, C: tl.constexpr):
    """Columns from `first` on of rows that lie `stride` apart."""
    columns = first + tl.arange(0, C)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], x_RC.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(blocks, heads, together):
    """Block and head of this program. Programs start in order: with the first block, the longest, of `together` heads,
    then with their second; with other heads when those are done, so that what is read stays in L2."""
    first = tl.program_id(0) // (blocks * together) * together
    width = tl.minimum(heads - first, together)
    place = tl.program_id(0) % (blocks * together)
    return place // width, first + place % width


@triton.jit
def _over(position, hole, resumed):
    """A position in a list with a hole in it."""
    return tl.where(position >= hole, position + resumed - hole, position)


@triton.jit
def _seen(spans_ptr, plane, m0, length, M: tl.constexpr, N: tl.constexpr):
    """Bounds of the keys that queries m0 … m0 + M see, all but the last multiples of N:
    [a, b) holds the prefix's end, [c, d) the document's start, [e, f) the diagonal; before a and in [d, e) all see all.
    """
    last = tl.minimum(m0 + M, length) - 1
    start = tl.load(spans_ptr + m0)
    prefix = tl.load(spans_ptr + 2 * plane + m0)
    prefix = tl.where(start == 0, 0, prefix)  # without a gap between them, it is part of the document
    a, b = prefix // N * N, tl.cdiv(prefix, N) * N
    c, d = tl.maximum(start // N * N, b), tl.cdiv(start, N) * N
    alone = tl.load(spans_ptr + last) == start
    e = tl.maximum(tl.where(alone, (m0 + 1) // N * N, 0), d)
    return a, b, c, d, e, last + 1


@triton.jit
def forward(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, y_ptr, lse_ptr, spans_ptr,
    batches, length, heads, width, scale, together,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, M)
    block, place = _place(blocks, batches * heads, together)
    batch, head, m0 = place // heads, place % heads, (blocks - 1 - block) * M
    spans_ptr += batch * length
    plane = batches * length
    m = m0 + tl.arange(0, M)
    start_M = tl.load(spans_ptr + m, mask=m < length, other=0)
    prefix = tl.load(spans_ptr + 2 * plane)
    a, b, c, d, e, f = _seen(spans_ptr, plane, m0, length, M, N)

    q_MD, q_ME = _tile(q_desc, q_rest_desc, batch, head, m0, M, D, E)
    top_M = tl.full((M,), LOWEST, tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    y_MV = tl.zeros((M, V), tl.float32)
    scale *= LOG2E
    for masked in tl.static_range(2):
        count = (b - a) + (d - c) + (f - e) if masked else a + e - d
        for at in tl.range(0, count, N, num_stages=STAGES):
            n0 = _over(_over(a + at, b, c), d, e) if masked else _over(at, a, d)
            k_ND, k_NE = _tile(k_desc, k_rest_desc, batch, head // GROUP, n0, N, D, E)
            v_NV = v_desc.load([batch, head // GROUP, n0, 0]).reshape(N, V)
            s_MN = _scores(q_MD, q_ME, k_ND, k_NE, tl.zeros((M, N), tl.float32), E)
            if masked:
                n = n0 + tl.arange(0, N)
                visible_MN = (n[None, :] >= start_M[:, None]) | (n < prefix)[None, :]
                s_MN = tl.where((n[None, :] <= m[:, None]) & visible_MN, s_MN * scale, LOWEST)
                higher_M = tl.maximum(top_M, tl.max(s_MN, 1))
                p_MN = tl.exp2(s_MN - higher_M[:, None])
            else:
                higher_M = tl.maximum(top_M, tl.max(s_MN, 1) * scale)
                p_MN = tl.exp2(s_MN * scale - higher_M[:, None])
            kept_M = tl.exp2(top_M - higher_M)
            total_M = total_M * kept_M + tl.sum(p_MN, 1)
            y_MV = dot(p_MN.to(v_NV.dtype), v_NV, y_MV * kept_M[:, None])
            top_M = higher_M
    y_ptr += (batch.to(tl.int64) * length * heads + head) * width
    _store(y_ptr, y_MV / total_M[:, None], m, length, heads * width, width, 0, M, V)
    tl.store(lse_ptr + place.to(tl.int64) * length + m, (top_M + tl.log2(total_M)) * LN2, mask=m < length)


@triton.jit
def backward_queries(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, y_desc, grad_desc, lse_ptr, start_ptr, spans_ptr, grad_q_ptr,
    batches, length, heads, width, scale, together, start_row,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and what `backward_keys` starts its sums from: −log Σ exp / scale and −Σ gradient · output
    of every query, [2, batches · heads, length] with rows `start_row` apart."""
    blocks = tl.cdiv(length, M)
    block, place = _place(blocks, batches * heads, together)
    batch, head, m0 = place // heads, place % heads, (blocks - 1 - block) * M
    spans_ptr += batch * length
    plane = batches * length
    m = m0 + tl.arange(0, M)
    start_M = tl.load(spans_ptr + m, mask=m < length, other=0)
    prefix = tl.load(spans_ptr + 2 * plane)
    a, b, c, d, e, f = _seen(spans_ptr, plane, m0, length, M, N)

    grad_MV = grad_desc.load([batch, head, m0, 0]).reshape(M, V)
    y_MV = y_desc.load([batch, head, m0, 0]).reshape(M, V)
    delta_M = tl.sum(grad_MV.to(tl.float32) * y_MV.to(tl.float32), 1)
    lse_M = tl.load(lse_ptr + place.to(tl.int64) * length + m, mask=m < length, other=0.0)
    tl.store(start_ptr + place.to(tl.int64) * start_row + m, -lse_M / scale, mask=m < length)
    tl.store(start_ptr + (place + batches * heads).to(tl.int64) * start_row + m, -delta_M, mask=m < length)
    q_MD, q_ME = _tile(q_desc, q_rest_desc, batch, head, m0, M, D, E)
    grad_q_MD = tl.zeros((M, D), tl.float32)
    grad_q_ME = tl.zeros((M, E if E > 0 else 1), tl.float32)
    for masked in tl.static_range(2):
        count = (b - a) + (d - c) + (f - e) if masked else a + e - d
        for at in tl.range(0, count, N, num_stages=STAGES):
            n0 = _over(_over(a + at, b, c), d, e) if masked else _over(at, a, d)
            k_ND, k_NE = _tile(k_desc, k_rest_desc, batch, head // GROUP, n0, N, D, E)
            v_NV = v_desc.load([batch, head // GROUP, n0, 0]).reshape(N, V)
            s_MN = _scores(q_MD, q_ME, k_ND, k_NE, tl.zeros((M, N), tl.float32), E)
            p_MN = tl.exp2(s_MN * (scale * LOG2E) - (lse_M * LOG2E)[:, None])
            if masked:
                n = n0 + tl.arange(0, N)
                visible_MN = (n[None, :] >= start_M[:, None]) | (n < prefix)[None, :]
                p_MN = tl.where((n[None, :] <= m[:, None]) & visible_MN, p_MN, 0.0)
            grad_p_MN = dot(grad_MV, v_NV.T, tl.zeros((M, N), tl.float32))
            grad_s_MN = (p_MN * (grad_p_MN - delta_M[:, None])).to(k_ND.dtype)
            grad_q_MD = dot(grad_s_MN, k_ND, grad_q_MD)
            if E > 0:
                grad_q_ME = dot(grad_s_MN, k_NE, grad_q_ME)
    grad_q_ptr += (batch.to(tl.int64) * length * heads + head) * width
    _store(grad_q_ptr, grad_q_MD * scale, m, length, heads * width, width, 0, M, D)
    if E > 0:
        _store(grad_q_ptr, grad_q_ME * scale, m, length, heads * width, width, D, M, E)


@triton.jit
def backward_keys(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, grad_desc, start_desc, spans_ptr, grad_k_ptr, grad_v_ptr,
    batches, length, heads, width, value_width, scale, together,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys and values of one head of theirs, from all the query heads that share it."""
    block, place = _place(tl.cdiv(length, N), batches * heads, together)
    batch, head, n0 = place // heads, place % heads, block * N
    n = n0 + tl.arange(0, N)
    end_N = tl.load(spans_ptr + (batches + batch) * length + n, mask=n < length, other=n0 + 1)
    # Tiles of queries in [a, b) lie on the diagonal, those in [c, d) over an end; in [b, c) all see all keys.
    a, b = n0 // M * M, tl.cdiv(n0 + N - 1, M) * M
    c, d = tl.maximum(tl.min(end_N) // M * M, b), tl.max(end_N)

    k_ND, k_NE = _tile(k_desc, k_rest_desc, batch, head, n0, N, D, E)
    v_NV = v_desc.load([batch, head, n0, 0]).reshape(N, V)
    grad_k_ND = tl.zeros((N, D), tl.float32)
    grad_k_NE = tl.zeros((N, E if E > 0 else 1), tl.float32)
    grad_v_NV = tl.zeros((N, V), tl.float32)
    for query_head in range(head * GROUP, (head + 1) * GROUP):
        first_query = batch * heads * GROUP + query_head
        for masked in tl.static_range(2):
            count = (b - a) + (d - c) if masked else c - b
            # The addresses of the held tiles' parts, moved out of the loop, would take 40 registers that it needs.
            for at in tl.range(0, count, M, num_stages=STAGES, disable_licm=True):
                m0 = _over(a + at, b, c) if masked else b + at
                m = m0 + tl.arange(0, M)
                q_MD, q_ME = _tile(q_desc, q_rest_desc, batch, query_head, m0, M, D, E)
                grad_MV = grad_desc.load([batch, query_head, m0, 0]).reshape(M, V)
                # Both sums start from what is to be taken off them, which then needs no registers of its own.
                lse_M = start_desc.load([0, first_query, m0]).reshape(M)
                delta_M = start_desc.load([1, first_query, m0]).reshape(M)
                s_NM = _scores(k_ND, k_NE, q_MD, q_ME, tl.broadcast_to(lse_M[None, :], (N, M)), E)
                p_NM = tl.exp2(s_NM * (scale * LOG2E))
                if masked:
                    p_NM = tl.where((m[None, :] >= n[:, None]) & (m[None, :] < end_N[:, None]), p_NM, 0.0)
                grad_v_NV = dot(p_NM.to(grad_MV.dtype), grad_MV, grad_v_NV)
                grad_p_NM = dot(v_NV, grad_MV.T, tl.broadcast_to(delta_M[None, :], (N, M)))
                grad_s_NM = (p_NM * grad_p_NM).to(q_MD.dtype)
                grad_k_ND = dot(grad_s_NM, q_MD, grad_k_ND)
                if E > 0:
                    grad_k_NE = dot(grad_s_NM, q_ME, grad_k_NE)
    grad_k_ptr += (batch.to(tl.int64) * length * heads + head) * width
    grad_v_ptr += (batch.to(tl.int64) * length * heads + head) * value_width
    _store(grad_k_ptr, grad_k_ND * scale, n, length, heads * width, width, 0, N, D)
    if E > 0:
        _store(grad_k_ptr, grad_k_NE * scale, n, length, heads * width, width, D, N, E)
    _store(grad_v_ptr, grad_v_NV, n, length, heads * value_width, value_width, 0, N, V)
