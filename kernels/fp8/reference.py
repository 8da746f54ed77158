"""Plain-torch definitions of the float8 operations: what every kernel is compared with, and what runs on a CPU.

The public functions have the names and signatures of those in `quantize` and of the products in `hopper` and
`portable`; `kernels.fp8.dispatch` chooses. Letters as in `kernels.fp8.formats`, and P routed rows, F expert width, T
tiles of 128 routed rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import eager
from kernels.fp8.formats import ALIGNMENT, BLOCK, FLOAT8, FLOAT8_MAX, Blocks, Rows, Weight

SMALLEST = 1e-10  # of the largest magnitude in a block: a block of zeros has a scale too


def scale_of(largest: Tensor, power_of_two: bool) -> Tensor:
    """The scale that puts `largest` at the end of the range; or the next power of two, which rounds no code twice."""
    scale = largest.clamp_min(SMALLEST) * (1.0 / FLOAT8_MAX)
    if not power_of_two:
        return scale
    return ((scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def quantize_rows(x_MK: Tensor, power_of_two: bool = False) -> Rows:
    """1 × 128 along the last dimension."""
    width = x_MK.shape[1]
    blocks_MkB = F.pad(x_MK.float(), (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    scales_Mk = scale_of(blocks_MkB.abs().amax(-1), power_of_two)
    codes = (blocks_MkB * scales_Mk.reciprocal()[..., None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).flatten(1)
    return Rows(_padded(codes[:, :width]), _padded(scales_Mk.T))


def quantize_across(x_MK: Tensor, power_of_two: bool = False) -> Rows:
    """1 × 128 of the transpose: codes [K, M], for sums over rows."""
    return quantize_rows(x_MK.T, power_of_two)


def _padded(x: Tensor) -> Tensor:
    """The same numbers in rows that begin a multiple of ALIGNMENT elements apart, zeros between."""
    width = x.shape[1]
    wide = torch.zeros(x.shape[0], width + -width % ALIGNMENT, dtype=x.dtype, device=x.device)
    wide[:, :width] = x
    return wide[:, :width]


def quantize_weight(weight: Tensor, power_of_two: bool = False, into: Weight | None = None) -> Weight:
    """`quantize_blocks`, and the same transposed; written over `into` where that is given."""
    codes, scales = quantize_blocks(weight, power_of_two)
    turned = codes.view(torch.uint8).mT.contiguous().view(FLOAT8)
    made = Weight(Blocks(codes, scales), Blocks(turned, scales.mT.contiguous()))
    if into is None:
        return made
    for old, new in zip((*into.forward, *into.backward), (*made.forward, *made.backward), strict=True):
        old.copy_(new)
    return into


def quantize_blocks(weight: Tensor, power_of_two: bool = False) -> Blocks:
    """128 × 128 of [N, K], or of each expert's in [E, N, K]."""
    n, k = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., n, B, k, B]
    scales = scale_of(blocks.abs().amax((-3, -1)), power_of_two)
    codes = (blocks * scales.reciprocal()[..., :, None, :, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return Blocks(codes.flatten(-4, -3).flatten(-2)[..., :n, :k].contiguous(), scales)


def rows_of(quantized: Rows) -> Tensor:
    """The values, fp32 [M, K]."""
    codes, scales = quantized
    return codes.float() * scales.T.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def blocks_of(quantized: Blocks) -> Tensor:
    """The values, fp32 [(E,) N, K]."""
    codes, scales = quantized
    n, k = codes.shape[-2:]
    return codes.float() * scales.repeat_interleave(BLOCK, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :k]


def gathered(x_NK: Tensor, source_P: Tensor | None) -> Tensor:
    """The rows of x that `source_P` names; zeros where it is negative."""
    if source_P is None:
        return x_NK
    return x_NK.index_select(0, source_P.clamp_min(0)) * (source_P >= 0)[:, None].to(x_NK.dtype)


def quantize(
    x_NK: Tensor,
    source_P: Tensor | None = None,
    rows: bool = True,
    across: bool = True,
    power_of_two: bool = False,
) -> tuple[Rows | None, Rows | None]:
    """`quantize_rows` and `quantize_across` of x, or of the rows of x that `source_P` names."""
    x_MK = gathered(x_NK, source_P)
    return (
        quantize_rows(x_MK, power_of_two) if rows else None,
        quantize_across(x_MK, power_of_two) if across else None,
    )


def norm_quantize(
    x_MK: Tensor, rstd_M: Tensor, gain_K: Tensor, rows: bool = True, across: bool = True, power_of_two: bool = False
) -> tuple[Rows | None, Rows | None]:
    """`quantize` of x · rstd · gain, which RMSNorm makes of x."""
    return quantize(x_MK.float() * rstd_M[:, None] * gain_K.float(), None, rows, across, power_of_two)


def swiglu_quantize(
    gate_up_P2F: Tensor, gates_P: Tensor | None, rows: bool = True, across: bool = True, power_of_two: bool = False
) -> tuple[Rows | None, Rows | None]:
    """`quantize` of silu(gate) · up · gates."""
    return quantize(eager.swiglu(gate_up_P2F.float(), gates_P), None, rows, across, power_of_two)


def swiglu_backward_quantize(
    grad_PF: Tensor, gate_up_P2F: Tensor, gates_P: Tensor | None, power_of_two: bool = False
) -> tuple[Rows, Rows, Tensor | None]:
    """`quantize` of the gradient of [gate, up], both ways, and the gradient of the gates (fp32 [P])."""
    grad_P2F, grad_gates_P = eager.swiglu_backward(grad_PF.float(), gate_up_P2F.float(), gates_P)
    return quantize_rows(grad_P2F, power_of_two), quantize_across(grad_P2F, power_of_two), grad_gates_P


def gemm(x: Rows, weight: Blocks, dtype: torch.dtype) -> Tensor:
    """x Wᵀ, [M, N], summed in fp32."""
    return (rows_of(x) @ blocks_of(weight).T).to(dtype)


def grouped_gemm(x: Rows, weight: Blocks, expert_T: Tensor, tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """x W[e]ᵀ, [P, N], with the expert of each 128 rows. Only the first `tiles` (int32 [1], where x lies) times 128
    rows need be multiplied, and only they are defined."""
    x_TBK = rows_of(x).unflatten(0, (-1, BLOCK))
    return torch.bmm(x_TBK, blocks_of(weight)[expert_T.long()].mT).flatten(0, 1).to(dtype)


def wgrad(y: Rows, x: Rows, dtype: torch.dtype) -> Tensor:
    """y xᵀ, [N, K]: y [N, M] and x [K, M] are quantised along the rows M that are summed over."""
    return (rows_of(y) @ rows_of(x).T).to(dtype)


def grouped_wgrad(y: Rows, x: Rows, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """y xᵀ of the rows of each expert, [E, N, K]. `ends_E` says where they end, multiples of 128; an expert without
    rows gets zeros."""
    y_NP, x_KP = rows_of(y), rows_of(x)
    starts = [0, *ends_E.tolist()]
    parts = [y_NP[:, a:b] @ x_KP[:, a:b].T for a, b in pairwise(starts)]
    return torch.stack(parts).to(dtype)
