"""MLA's keys from their two parts, and the gradients of the parts. One program a token. Letters: N tokens, H heads,
n, R and v: widths of a head's unrotated part, of the rotary part that heads share, and of a value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _assemble(
    up_ptr, rope_ptr, key_ptr, up_token, rope_token,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads, nope, rope = tl.arange(0, H)[:, None], tl.arange(0, N)[None, :], tl.arange(0, R)[None, :]
    key_ptr += token * HEADS * (NOPE + ROPE) + heads * (NOPE + ROPE)
    inside = (heads < HEADS) & (nope < NOPE)
    k_HN = tl.load(up_ptr + token * up_token + heads * (NOPE + VALUE) + nope, mask=inside)
    tl.store(key_ptr + nope, k_HN, mask=inside)
    shared_R = tl.load(rope_ptr + token * rope_token + rope, mask=rope < ROPE)
    tl.store(key_ptr + NOPE + rope, shared_R.broadcast_to((H, R)), mask=(heads < HEADS) & (rope < ROPE))


@triton.jit
def _take_apart(
    grad_key_ptr, grad_value_ptr, grad_up_ptr, grad_rope_ptr,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, H)[:, None]
    nope, rope, value = tl.arange(0, N)[None, :], tl.arange(0, R)[None, :], tl.arange(0, V)[None, :]
    grad_key_ptr += token * HEADS * (NOPE + ROPE) + heads * (NOPE + ROPE)
    grad_up_ptr += token * HEADS * (NOPE + VALUE) + heads * (NOPE + VALUE)
    inside = (heads < HEADS) & (nope < NOPE)
    tl.store(grad_up_ptr + nope, tl.load(grad_key_ptr + nope, mask=inside), mask=inside)
    inside = (heads < HEADS) & (value < VALUE)
    grad_HV = tl.load(grad_value_ptr + token * HEADS * VALUE + heads * VALUE + value, mask=inside)
    tl.store(grad_up_ptr + NOPE + value, grad_HV, mask=inside)
    inside = (heads < HEADS) & (rope < ROPE)
    grad_HR = tl.load(grad_key_ptr + NOPE + rope, mask=inside, other=0.0).to(tl.float32)
    columns = tl.arange(0, R)
    grad_R = tl.sum(grad_HR, axis=0).to(grad_rope_ptr.dtype.element_ty)
    tl.store(grad_rope_ptr + token * ROPE + columns, grad_R, mask=columns < ROPE)


def assemble_keys(up: Tensor, rope: Tensor, nope: int) -> Tensor:
    """`eager.assemble_keys`."""
    heads, width, rotary = up.shape[-2], up.shape[-1], rope.shape[-1]
    up_NX, rope_NR = up.flatten(0, -3).flatten(1).contiguous(), rope.flatten(0, -2)
    if rope_NR.stride(1) != 1:
        rope_NR = rope_NR.contiguous()
    key = torch.empty(*up.shape[:-1], nope + rotary, dtype=up.dtype, device=up.device)
    _assemble[(len(up_NX),)](
        up_NX, rope_NR, key, up_NX.stride(0), rope_NR.stride(0), HEADS=heads, NOPE=nope, ROPE=rotary,
        VALUE=width - nope, **_tile(heads, N=nope, R=rotary),
    )  # fmt: skip
    return key


def assemble_keys_backward(grad_key: Tensor, grad_value: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """`eager.assemble_keys_backward`; the heads' shares of the rotary part are summed in fp32."""
    grad_key, grad_value = grad_key.contiguous(), grad_value.contiguous()
    heads, value = grad_value.shape[-2:]
    nope = grad_key.shape[-1] - rotary
    grad_up = grad_key.new_empty(*grad_key.shape[:-1], nope + value)
    grad_rope = grad_key.new_empty(*grad_key.shape[:-2], rotary)
    _take_apart[(grad_rope.shape[:-1].numel(),)](
        grad_key, grad_value, grad_up, grad_rope, HEADS=heads, NOPE=nope, ROPE=rotary, VALUE=value,
        **_tile(heads, N=nope, R=rotary, V=value),
    )  # fmt: skip
    return grad_up, grad_rope


def _tile(heads: int, **widths: int) -> dict[str, int]:
    return {"H": triton.next_power_of_2(heads)} | {name: triton.next_power_of_2(w) for name, w in widths.items()}
