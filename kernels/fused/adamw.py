"""AdamW's step over one tensor, master weight included, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _adamw(
    weight_ptr, low_ptr, grad_ptr, m_ptr, v_ptr, n, scale, rate, decay, beta1, beta2, eps, correction1, correction2,
    SPLIT: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = offsets < n
    if SPLIT:
        high = tl.load(weight_ptr + offsets, mask=inside, other=0).to(tl.int32)
        low = tl.load(low_ptr + offsets, mask=inside, other=0).to(tl.int32)
        master = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    m = tl.load(m_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    m = m + (1.0 - beta1) * (grad - m)
    v = beta2 * v + (1.0 - beta2) * grad * grad
    master = master * (1.0 - rate * decay)
    master = master - (rate / correction1) * m / (tl.sqrt(v / correction2) + eps)
    tl.store(m_ptr + offsets, m.to(m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + offsets, v.to(v_ptr.dtype.element_ty), mask=inside)
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weight_ptr + offsets, high.to(tl.int16), mask=inside)
        tl.store(low_ptr + offsets, (bits - (high << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + offsets, master, mask=inside)


def adamw_step(
    weight: Tensor,
    low: Tensor | None,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    scale: float,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """`eager.adamw_step`."""
    tensors = [t for t in (weight, low, grad, m, v) if t is not None]
    assert all(t.is_contiguous() and t.numel() == weight.numel() for t in tensors), [t.shape for t in tensors]
    words = weight if low is None else weight.view(torch.int16)
    correction1, correction2 = 1.0 - betas[0] ** step, 1.0 - betas[1] ** step
    _adamw[(triton.cdiv(weight.numel(), BLOCK),)](
        words, low, grad, m, v, weight.numel(), scale, rate, decay, *betas, eps, correction1, correction2,
        SPLIT=low is not None, B=BLOCK, num_warps=8,
    )  # fmt: skip
