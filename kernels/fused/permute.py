"""The sum of each token's routed rows. Letters: N tokens, K rows of a token, P rows in all, D width."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048


@triton.jit
def _gather_sum(y_ptr, row_ptr, out_ptr, d, K: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    inside = columns < d
    total_C = tl.zeros((C,), tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(row_ptr + token * K + choice)
        total_C += tl.load(y_ptr + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * d + columns, total_C.to(out_ptr.dtype.element_ty), mask=inside)


def gather_sum(y_PD: Tensor, row_R: Tensor, n_tokens: int) -> Tensor:
    """`eager.gather_sum`, in fp32 and in the order of the choices: no row is written between gather and sum."""
    y_PD = y_PD.contiguous()
    width = y_PD.shape[1]
    out_ND = y_PD.new_empty(n_tokens, width)
    if n_tokens:
        columns = min(COLUMNS, triton.next_power_of_2(width))
        grid = (n_tokens, triton.cdiv(width, columns))
        _gather_sum[grid](y_PD, row_R, out_ND, width, K=row_R.numel() // n_tokens, C=columns)
    return out_ND
