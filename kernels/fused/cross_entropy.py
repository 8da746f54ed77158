"""Cross-entropy of logits and, over them, its gradient. Letters: n rows, V vocabulary, C columns of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192


@triton.jit
def _cross_entropy(logits_ptr, targets_ptr, loss_ptr, v, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * v
    target = tl.load(targets_ptr + row)
    chosen = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
    top_C = tl.full((C,), float("-inf"), tl.float32)
    total_C = tl.zeros((C,), tl.float32)
    for start in range(0, v, C):
        columns = start + tl.arange(0, C)
        x_C = tl.load(logits_ptr + columns, mask=columns < v, other=float("-inf")).to(tl.float32)
        higher_C = tl.maximum(top_C, x_C)
        # A column that has seen nothing yet is −inf on both sides.
        safe_C = tl.where(higher_C == float("-inf"), 0.0, higher_C)
        total_C = total_C * tl.exp(top_C - safe_C) + tl.exp(x_C - safe_C)
        top_C = higher_C
    top = tl.max(top_C, axis=0)
    logsumexp = top + tl.log(tl.sum(total_C * tl.exp(top_C - top), axis=0))
    tl.store(loss_ptr + row, tl.where(target < 0, 0.0, logsumexp - chosen))
    tl.debug_barrier()  # the target's logit has been read by all before it is overwritten
    for start in range(0, v, C):  # the row is still in cache
        columns = start + tl.arange(0, C)
        x_C = tl.load(logits_ptr + columns, mask=columns < v, other=float("-inf")).to(tl.float32)
        grad_C = tl.exp(x_C - logsumexp) - tl.where(columns == target, 1.0, 0.0)
        grad_C = tl.where(target < 0, 0.0, grad_C)
        tl.store(logits_ptr + columns, grad_C.to(logits_ptr.dtype.element_ty), mask=columns < v)


def cross_entropy_gradient(logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """`eager.cross_entropy_gradient`; the gradient takes the place of the logits."""
    rows, width = logits_nV.shape
    loss_n = torch.empty(rows, dtype=torch.float32, device=logits_nV.device)
    if rows:
        columns = min(COLUMNS, triton.next_power_of_2(width))
        _cross_entropy[(rows,)](logits_nV, targets_n.contiguous(), loss_n, width, C=columns, num_warps=16)
    return loss_n, logits_nV
