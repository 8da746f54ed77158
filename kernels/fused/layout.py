"""Rows laid out expert by expert without a sort: places inside a block of pairs, then blocks, then experts.

Three kernels, since a launch is the barrier between blocks. Letters: N tokens, E experts, K chosen; R = N·K pairs in b
blocks of B, P rows with padding, L tiles; C pairs or blocks of a step, X experts of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # pairs: a pair is compared with all of its block, and a block has a count for every expert
STEP = 16  # pairs that all are compared with at once: 64 take every register
SCAN = {"C": 256, "X": 16, "num_warps": 8}


@triton.jit
def _count(expert_ptr, rank_ptr, count_ptr, n, E: tl.constexpr, X: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """How many pairs of its block chose the same expert before it, for each pair; how many chose each expert."""
    block = tl.program_id(0)
    pairs, columns = block * B + tl.arange(0, B), tl.arange(0, X)
    expert_B = tl.load(expert_ptr + pairs, mask=pairs < n, other=-1).to(tl.int32)
    rank_B, count_X = tl.zeros((B,), tl.int32), tl.zeros((X,), tl.int32)
    for start in range(0, B, C):
        others = block * B + start + tl.arange(0, C)
        other_C = tl.load(expert_ptr + others, mask=others < n, other=-1).to(tl.int32)
        before_CB = (other_C[:, None] == expert_B[None, :]) & (others[:, None] < pairs[None, :])
        rank_B += tl.sum(before_CB.to(tl.int32), axis=0)
        count_X += tl.sum((other_C[:, None] == columns[None, :]).to(tl.int32), axis=0)
    tl.store(rank_ptr + pairs, rank_B, mask=pairs < n)
    tl.store(count_ptr + block * E + columns, count_X, mask=columns < E)


@triton.jit
def _scan(count_ptr, before_ptr, load_ptr, blocks, E: tl.constexpr, C: tl.constexpr, X: tl.constexpr):
    """How many pairs of the blocks before chose each expert, for each block; how many of all."""
    columns = tl.program_id(0) * X + tl.arange(0, X)
    total_X = tl.zeros((X,), tl.int32)
    for start in range(0, blocks, C):
        rows = start + tl.arange(0, C)
        inside = (rows < blocks)[:, None] & (columns < E)[None, :]
        offsets = rows[:, None] * E + columns[None, :]
        count_CX = tl.load(count_ptr + offsets, mask=inside, other=0)
        before_CX = tl.cumsum(count_CX, axis=0) - count_CX + total_X[None, :]
        tl.store(before_ptr + offsets, before_CX, mask=inside)
        total_X += tl.sum(count_CX, axis=0)
    tl.store(load_ptr + columns, total_X.to(tl.int64), mask=columns < E)


@triton.jit
def _pad(pair_ptr, source_ptr, real_ptr, rows, where):
    tl.store(pair_ptr + rows, tl.zeros_like(rows).to(tl.int64), mask=where)
    tl.store(source_ptr + rows, tl.zeros_like(rows).to(tl.int64), mask=where)
    tl.store(real_ptr + rows, tl.zeros_like(rows).to(tl.float32), mask=where)


@triton.jit
def _place(
    expert_ptr, rank_ptr, before_ptr, load_ptr, pair_ptr, source_ptr, real_ptr, row_ptr, ends_ptr, tile_ptr, n, tiles,
    K: tl.constexpr, E: tl.constexpr, X: tl.constexpr, TILE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Every pair of a block to its row; the e-th program also the padding behind expert e, and the e-th spare tile."""
    block, columns = tl.program_id(0), tl.arange(0, X)
    load_X = tl.load(load_ptr + columns, mask=columns < E, other=0).to(tl.int32)
    room_X = (load_X + TILE - 1) // TILE * TILE
    ends_X = tl.cumsum(room_X, axis=0)
    if block == 0:
        tl.store(ends_ptr + columns, ends_X, mask=columns < E)
    pairs = block * B + tl.arange(0, B)
    inside = pairs < n
    expert_B = tl.load(expert_ptr + pairs, mask=inside, other=0)
    row_B = tl.load(rank_ptr + pairs, mask=inside, other=0)
    row_B += tl.load(before_ptr + block * E + expert_B, mask=inside, other=0)
    row_B += tl.gather(ends_X - room_X, expert_B.to(tl.int32), 0)
    tl.store(row_ptr + pairs, row_B.to(tl.int64), mask=inside)
    tl.store(pair_ptr + row_B, pairs.to(tl.int64), mask=inside)
    tl.store(source_ptr + row_B, (pairs // K).to(tl.int64), mask=inside)
    tl.store(real_ptr + row_B, 1.0, mask=inside)
    tl.store(tile_ptr + row_B // TILE, expert_B, mask=inside & (row_B % TILE == 0))
    if TILE > 1 and block < E:
        steps, mine = tl.arange(0, TILE), columns == block
        padding = tl.sum(tl.where(mine, ends_X - room_X + load_X, 0), axis=0) + steps
        _pad(pair_ptr, source_ptr, real_ptr, padding, padding < tl.sum(tl.where(mine, ends_X, 0), axis=0))
        spare = tl.sum(room_X, axis=0) + block * TILE + steps
        unused = spare < tiles * TILE
        _pad(pair_ptr, source_ptr, real_ptr, spare, unused)
        tl.store(tile_ptr + spare // TILE, tl.full((TILE,), E - 1, tl.int64), mask=unused & (steps == 0))


def layout(indices_NK: Tensor, n_experts: int, tile: int) -> tuple[Tensor, ...]:
    """`eager.layout`."""
    expert_R, device = indices_NK.flatten().contiguous(), indices_NK.device
    n, width = len(expert_R), triton.next_power_of_2(n_experts)
    blocks = triton.cdiv(n, BLOCK)
    n_tiles = n // tile + n_experts if tile > 1 else n
    rank_R = torch.empty(n, dtype=torch.int32, device=device)
    count_bE, before_bE = torch.empty(2, blocks, n_experts, dtype=torch.int32, device=device)
    pair_P, source_P = torch.empty(2, n_tiles * tile, dtype=torch.int64, device=device)
    real_P = torch.empty(n_tiles * tile, device=device)
    row_R, expert_L = torch.empty_like(expert_R), torch.empty(n_tiles, dtype=torch.int64, device=device)
    load_E = torch.empty(n_experts, dtype=torch.int64, device=device)
    ends_E = torch.empty(n_experts, dtype=torch.int32, device=device)
    if n:
        _count[(blocks,)](expert_R, rank_R, count_bE, n, E=n_experts, X=width, C=STEP, B=BLOCK)
    _scan[(triton.cdiv(n_experts, SCAN["X"]),)](count_bE, before_bE, load_E, blocks, E=n_experts, **SCAN)
    _place[(max(blocks, n_experts if tile > 1 else 1),)](
        expert_R, rank_R, before_bE, load_E, pair_P, source_P, real_P, row_R, ends_E, expert_L, n, n_tiles,
        K=indices_NK.shape[1], E=n_experts, X=width, TILE=tile, B=BLOCK,
    )  # fmt: skip
    return pair_P, source_P, real_P, row_R, load_E, ends_E, expert_L
