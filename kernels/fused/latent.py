"""MLA's decoding over its cache of latents, as DeepSeek-V2 absorbs it: every head of a token reads one cache, whose
rows are keys, and values without their rotary part. It is read once, and no further than a row is long.

Few rows leave processors idle, so the slots of a row are split among programs, and the parts weighed by their sums.
Letters: B rows, T tokens a row, N = B·T, H heads, S slots, C latent width, R rotary width, P splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import dot, processors

HEADS, MOST_SPLITS = 16, 16
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q_ptr, q_rope_ptr, cache_ptr, position_ptr, y_ptr, part_ptr, log_sum_ptr, n, heads, length, slots, q_token,
    q_head, rope_token, rope_head, cache_row, scale,
    LATENT: tl.constexpr, ROPE: tl.constexpr, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    token, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * H + tl.arange(0, H)
    c, r = tl.arange(0, C), tl.arange(0, R)
    q_ptr += token.to(tl.int64) * q_token + head[:, None].to(tl.int64) * q_head
    q_rope_ptr += token.to(tl.int64) * rope_token + head[:, None] * rope_head
    mine = head[:, None] < heads
    q_HC = tl.load(q_ptr + c[None, :], mask=mine & (c[None, :] < LATENT), other=0.0)
    q_HR = tl.load(q_rope_ptr + r[None, :], mask=mine & (r[None, :] < ROPE), other=0.0)
    cache_ptr += (token // length).to(tl.int64) * cache_row
    seen = tl.minimum(tl.load(position_ptr + token).to(tl.int32) + 1, slots)
    share = tl.cdiv(tl.cdiv(seen, S), SPLITS) * S
    first = split * share
    last = tl.minimum(first + share, seen)
    most_H = tl.full((H,), float("-inf"), tl.float32)
    sum_H = tl.zeros((H,), tl.float32)
    y_HC = tl.zeros((H, C), tl.float32)
    for start in range(first, last, S):
        slot = start + tl.arange(0, S)
        k_ptr = cache_ptr + slot[:, None] * (LATENT + ROPE)
        inside = slot[:, None] < last
        k_SC = tl.load(k_ptr + c[None, :], mask=inside & (c[None, :] < LATENT), other=0.0)
        k_SR = tl.load(k_ptr + LATENT + r[None, :], mask=inside & (r[None, :] < ROPE), other=0.0)
        score_HS = dot(q_HR, tl.trans(k_SR), tl.zeros((H, S), tl.float32))
        score_HS = dot(q_HC, tl.trans(k_SC), score_HS) * scale
        score_HS = tl.where(slot[None, :] < last, score_HS, float("-inf"))
        new_H = tl.maximum(most_H, tl.max(score_HS, 1))
        weight_HS = tl.exp2(score_HS - new_H[:, None])
        fade_H = tl.exp2(most_H - new_H)
        sum_H = sum_H * fade_H + tl.sum(weight_HS, 1)
        y_HC = dot(weight_HS.to(k_SC.dtype), k_SC, y_HC * fade_H[:, None])
        most_H = new_H
    y_HC /= tl.where(sum_H > 0, sum_H, 1.0)[:, None]  # a split of a short row may be empty
    out = token.to(tl.int64) * heads + head
    inside = mine & (c[None, :] < LATENT)
    if SPLITS == 1:
        tl.store(y_ptr + out[:, None] * LATENT + c[None, :], y_HC.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        out += split * n * heads
        tl.store(part_ptr + out[:, None] * LATENT + c[None, :], y_HC, mask=inside)
        tl.store(log_sum_ptr + out, most_H + tl.log2(sum_H), mask=head < heads)


def tile(c: int) -> int:
    """Slots of a tile of latents of padded width c."""
    return 64 if c <= 256 else 32


def latent_attention(
    q_NHC: Tensor, q_NHR: Tensor, cached_BSL: Tensor, position_BT: Tensor, mask_BTS: Tensor, scale: float
) -> Tensor:
    """`eager.latent_attention`; slots past a token's position or past the mask are not read, and the queries lie where
    they were made."""
    (n, heads, rank), rope, device = q_NHC.shape, q_NHR.shape[2], q_NHC.device
    assert q_NHC.stride(2) == q_NHR.stride(2) == cached_BSL.stride(2) == 1, "columns must be one after another"
    assert cached_BSL.stride(1) == rank + rope, f"slots must be one after another: {cached_BSL.stride()}"
    blocks = triton.cdiv(heads, HEADS)
    c = triton.next_power_of_2(max(rank, 16))
    slots, size = mask_BTS.shape[-1], tile(c)
    tiles = triton.cdiv(slots, size)
    splits = 1
    while splits < min(MOST_SPLITS, tiles) and n * blocks * splits < processors(device):
        splits *= 2
    y_NHC = torch.empty(n, heads, rank, dtype=q_NHC.dtype, device=device)
    part_PNHC = torch.empty(splits, n, heads, rank, dtype=torch.float32, device=device) if splits > 1 else y_NHC
    log_sum_PNH = torch.empty(splits, n, heads, dtype=torch.float32, device=device) if splits > 1 else y_NHC
    _attend[(n, blocks, splits)](
        q_NHC, q_NHR, cached_BSL, position_BT.contiguous(), y_NHC, part_PNHC, log_sum_PNH, n, heads,
        position_BT.shape[1], slots, *q_NHC.stride()[:2], *q_NHR.stride()[:2], cached_BSL.stride(0), scale * LOG2_E,
        LATENT=rank, ROPE=rope, H=HEADS, C=c, R=triton.next_power_of_2(max(rope, 16)), S=size, SPLITS=splits,
    )  # fmt: skip
    if splits == 1:
        return y_NHC
    weight_PNH = torch.softmax(log_sum_PNH / LOG2_E, dim=0)
    return torch.einsum("pnhc,pnh->nhc", part_PNHC, weight_PNH).to(q_NHC.dtype)
