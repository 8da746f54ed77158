"""Rotation of the last dims of queries and keys. Letters: B sequences, T positions, H heads, W width of a head, R rows
and P pairs of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, n, heads, length, x_token, x_head, angle_sequence, angle_position, sign,
    STILL: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    token, valid = rows // heads, rows[:, None] < n
    x_ptr += (token.to(tl.int64) * x_token + (rows % heads) * x_head)[:, None]
    y_ptr += rows[:, None].to(tl.int64) * (STILL + 2 * HALF)
    if STILL > 0:
        columns = tl.arange(0, S)[None, :]
        still = valid & (columns < STILL)
        tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=still), mask=still)
    angle = (token // length) * angle_sequence + (token % length) * angle_position
    pairs = tl.arange(0, P)[None, :]
    turned = valid & (pairs < HALF)
    cos_RP = tl.load(cos_ptr + angle[:, None] + pairs, mask=turned, other=0.0).to(tl.float32)
    sin_RP = tl.load(sin_ptr + angle[:, None] + pairs, mask=turned, other=0.0).to(tl.float32) * sign
    a_RP = tl.load(x_ptr + STILL + pairs, mask=turned, other=0.0).to(tl.float32)
    b_RP = tl.load(x_ptr + STILL + HALF + pairs, mask=turned, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + STILL + pairs, (a_RP * cos_RP - b_RP * sin_RP).to(dtype), mask=turned)
    tl.store(y_ptr + STILL + HALF + pairs, (b_RP * cos_RP + a_RP * sin_RP).to(dtype), mask=turned)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """`eager.rotate` of [B, T, H, W] or [B, T, W]. A column slice of a wider product is read where it lies, and so are
    angles that sequences and heads share."""
    if x.ndim == 3:
        return rotate(x.unsqueeze(2), cos.unsqueeze(-2), sin.unsqueeze(-2), inverse).squeeze(2)
    batch, length, heads, width = x.shape
    half = cos.shape[-1]
    assert cos.shape[-2] == 1, f"angles must not depend on the head: {tuple(cos.shape)}"
    if x.stride(3) != 1 or x.stride(0) != length * x.stride(1):
        x = x.contiguous()
    cos, sin = (t.contiguous().expand(batch, length, 1, half) for t in (cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n, still = batch * length * heads, width - 2 * half
    if n:
        _rotate[(triton.cdiv(n, ROWS),)](
            x, cos, sin, y, n, heads, length, x.stride(1), x.stride(2), cos.stride(0), cos.stride(1),
            -1.0 if inverse else 1.0, STILL=still, HALF=half, R=ROWS,
            S=triton.next_power_of_2(max(still, 1)), P=triton.next_power_of_2(half),
        )  # fmt: skip
    return y
