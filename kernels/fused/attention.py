"""Attention inside packed documents: what tells the kernels who sees whom, and their launches.

Work is proportional to the sum of the documents' squared lengths, and nothing as large as T² is ever held. No atomics:
the same bits every time. Letters as in `kernels.reference`; the kernels' own in `attention_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fused import attention_kernels
from kernels.reference import PREFIX


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


# By the widest head that a tile is for, its width rounded up as `_parts` does. The gradients of keys of 192 take 160
# registers of a thread for their sums: with 64 queries the rest does not fit.
FORWARD = {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 192: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2)}
BACKWARD_QUERIES = {
    64: Tile(128, 64, 8, 3),
    128: Tile(128, 64, 8, 2),
    192: Tile(128, 64, 8, 2),
    256: Tile(128, 32, 8, 1),
}
BACKWARD_KEYS = {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 192: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 2)}
FP32 = Tile(32, 32, 4, 1)  # not on tensor cores: for tests
L2_BYTES = 24 << 20  # of what programs that run together read again and again; a Hopper chip has 50 MB


def visibility(document_BT: Tensor) -> Tensor:
    """`eager.visibility` as bounds, int32 [3, B, T]: where a token's document starts, before which query the token is
    seen no more, and how long its row's prefix is."""
    length = document_BT.shape[1]
    place_T = torch.arange(length, device=document_BT.device)
    changes_BT = document_BT[:, 1:] != document_BT[:, :-1]
    start_BT = torch.where(F.pad(changes_BT, (1, 0), value=True), place_T, 0).cummax(1).values
    end_BT = torch.where(F.pad(changes_BT, (0, 1), value=True), place_T + 1, length).flip(1).cummin(1).values.flip(1)
    prefix_BT = document_BT == PREFIX
    end_BT = end_BT.masked_fill(prefix_BT, length)
    return torch.stack([start_BT, end_BT, prefix_BT.sum(1, keepdim=True).expand_as(start_BT)]).to(torch.int32)


def document_attention(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTv: Tensor, spans_3BT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.document_attention` under `visibility`, [B, T, H, v] in memory, and log Σ exp of the scores, fp32
    [B, H, T]."""
    batch, heads, length = q_BHTd.shape[:3]
    assert heads % k_BKTd.shape[1] == 0, (q_BHTd.shape, k_BKTd.shape)
    y_BTHv = q_BHTd.new_empty(batch, length, heads, v_BKTv.shape[3])
    lse_BHT = q_BHTd.new_empty(batch, heads, length, dtype=torch.float32)
    tile, sizes = _tile(FORWARD, q_BHTd, v_BKTv)
    q, k, v = _aligned(q_BHTd), _aligned(k_BKTd), _aligned(v_BKTv)
    attention_kernels.forward[_grid(length, tile.queries, batch * heads)](
        *_described(q, tile.queries, sizes), *_described(k, tile.keys, sizes), _value(v, tile.keys, sizes),
        y_BTHv, lse_BHT, spans_3BT, batch, length, heads, v_BKTv.shape[3], scale, _together(k, v, batch * heads),
        GROUP=heads // k.shape[1], **sizes, **_options(tile),
    )  # fmt: skip
    return y_BTHv.transpose(1, 2), lse_BHT


def document_attention_backward(
    grad_BHTv: Tensor,
    q_BHTd: Tensor,
    k_BKTd: Tensor,
    v_BKTv: Tensor,
    y_BHTv: Tensor,
    lse_BHT: Tensor,
    spans_3BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each with its tokens before its heads in memory."""
    batch, heads, length, width = q_BHTd.shape
    kv_heads, value_width = k_BKTd.shape[1], v_BKTv.shape[3]
    q, k, v, y, grad = map(_aligned, (q_BHTd, k_BKTd, v_BKTv, y_BHTv, grad_BHTv))
    grad_q, grad_k, grad_v = (x.new_empty(batch, length, *x.shape[1::2]) for x in (q_BHTd, k_BKTd, v_BKTv))
    start_row = triton.cdiv(length, 4) * 4  # 16 bytes, for TMA
    start = torch.empty(2, batch * heads, start_row, dtype=torch.float32, device=q.device)

    tile, sizes = _tile(BACKWARD_QUERIES, q_BHTd, v_BKTv)
    attention_kernels.backward_queries[_grid(length, tile.queries, batch * heads)](
        *_described(q, tile.queries, sizes), *_described(k, tile.keys, sizes), _value(v, tile.keys, sizes),
        _value(y, tile.queries, sizes), _value(grad, tile.queries, sizes), lse_BHT, start, spans_3BT, grad_q,
        batch, length, heads, width, scale, _together(k, v, batch * heads), start_row,
        GROUP=heads // kv_heads, **sizes, **_options(tile),
    )  # fmt: skip

    tile, sizes = _tile(BACKWARD_KEYS, q_BHTd, v_BKTv)
    shape, strides = [2, batch * heads, length], list(start.stride())
    attention_kernels.backward_keys[_grid(length, tile.keys, batch * kv_heads)](
        *_described(q, tile.queries, sizes), *_described(k, tile.keys, sizes), _value(v, tile.keys, sizes),
        _value(grad, tile.queries, sizes), TensorDescriptor(start, shape, strides, [1, 1, tile.queries]),
        spans_3BT, grad_k, grad_v, batch, length, kv_heads, width, value_width, scale,
        _together(q, grad, batch * kv_heads), GROUP=heads // kv_heads, **sizes, **_options(tile),
    )  # fmt: skip
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _tile(table: dict[int, Tile], q: Tensor, v: Tensor) -> tuple[Tile, dict[str, int]]:
    """The tile for heads of these widths, and the kernels' sizes."""
    first, rest = _parts(q.shape[3])
    value = max(16, triton.next_power_of_2(v.shape[3]))
    widest = max(first + rest, value)
    assert widest <= max(table), f"no tile for heads of {q.shape[3]} and {v.shape[3]}"
    tile = FP32 if q.dtype == torch.float32 else next(tile for width, tile in table.items() if widest <= width)
    return tile, {"M": tile.queries, "N": tile.keys, "D": first, "E": rest, "V": value}


def _parts(width: int) -> tuple[int, int]:
    """A width as one power of two, or as two where that is less: 192 = 128 + 64, not 256."""
    whole = max(16, triton.next_power_of_2(width))
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


def _options(tile: Tile) -> dict[str, int]:
    return {"STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages}


def _grid(length: int, rows: int, heads: int) -> tuple[int]:
    return (triton.cdiv(length, rows) * heads,)


def _together(a: Tensor, b: Tensor, heads: int) -> int:
    """How many heads programs take at a time, `a` and `b` being what they read again; as many each time."""
    each = (a[0, 0].numel() + b[0, 0].numel()) * a.element_size()
    times = triton.cdiv(heads * each, L2_BYTES)
    return triton.cdiv(heads, min(times, heads))


def _aligned(x: Tensor) -> Tensor:
    """x as TMA can read it: a token's numbers side by side, and tokens on multiples of 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(3) == 1 and all(stride and stride % step == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -x.shape[3] % step)).contiguous()


def _described(x: Tensor, rows: int, sizes: dict[str, int]) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Queries or keys, by the two parts of their width."""
    first, rest = sizes["D"], sizes["E"]
    return _descriptor(x, rows, first), _descriptor(x, rows, rest) if rest else None


def _value(x: Tensor, rows: int, sizes: dict[str, int]) -> TensorDescriptor:
    return _descriptor(x, rows, sizes["V"])


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns])
