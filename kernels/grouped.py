"""Routed rows laid out expert by expert, and the grouped products over them.

Two layouts, chosen in `permutation`:

- compact (tile 1): each expert's rows follow the last's; `torch.nn.functional.grouped_mm` multiplies them.
- tiled: each expert's rows start at a multiple of `tile` and padding fills the gaps, as DeepGEMM's contiguous layout
  has it. Every tile has one expert, so the product is one batched GEMM whose shape depends on the number of rows
  alone. On CPU in bf16 that matters tenfold: oneDNN compiles a kernel for every new shape, and expert loads are
  new shapes at every step.

Padding rows copy token 0 and carry gate 0. Their hidden rows are then zero and so is every gradient that reaches a
weight; their outputs are read by nobody. Letters as in `kernels.reference`, and P rows, padding included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import implementation

TILES = (16, 32, 64, 128, 256)


class Permutation(NamedTuple):
    """pair_P: which (token, choice) pair, counted token by token, each row is. source_P: its token. real_P: 0 in
    padding, else 1 (fp32). row_R: row of each pair. load_E: rows per expert without padding, int64. ends_E: where each
    expert's rows end, int32. expert_L: expert of each tile. tile: rows per tile."""

    pair_P: Tensor
    source_P: Tensor
    real_P: Tensor
    row_R: Tensor
    load_E: Tensor
    ends_E: Tensor
    expert_L: Tensor
    tile: int


def permutation(indices_NK: Tensor, n_experts: int, dtype: torch.dtype) -> Permutation:
    """The stable order that gathers every expert's rows, in the layout that suits products in `dtype` there."""
    if compact(indices_NK.device, dtype):
        return layout(indices_NK, n_experts, tile=1)
    # The largest tile that keeps padding below the real rows.
    tile = max([size for size in TILES if size * n_experts <= indices_NK.numel()] or TILES[:1])
    return layout(indices_NK, n_experts, tile)


def compact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` is fast there: it is bf16 alone on CUDA, and on CPU all dtypes but bf16."""
    return (device.type == "cuda") == (dtype == torch.bfloat16)


def layout(indices_NK: Tensor, n_experts: int, tile: int) -> Permutation:
    """`permutation` with the tile given. No shape depends on how the rows are spread over experts."""
    return Permutation(*implementation(indices_NK).layout(indices_NK, n_experts, tile), tile)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, source_P: Tensor, row_R: Tensor) -> Tensor:
        ctx.save_for_backward(row_R)
        ctx.n_tokens = x_ND.shape[0]
        return x_ND.index_select(0, source_P)

    @staticmethod
    def backward(ctx, grad_PD: Tensor):
        return implementation(grad_PD).gather_sum(grad_PD, *ctx.saved_tensors, ctx.n_tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_PD: Tensor, source_P: Tensor, row_R: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(source_P)
        return implementation(y_PD).gather_sum(y_PD, row_R, n_tokens)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        return grad_ND.index_select(0, *ctx.saved_tensors), None, None, None


class _PermuteGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_NK: Tensor, pair_P: Tensor, row_R: Tensor, real_P: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_R)
        ctx.shape = gates_NK.shape
        gates_P = gates_NK.flatten().index_select(0, pair_P)
        return gates_P if real_P is None else gates_P.mul_(real_P)

    @staticmethod
    def backward(ctx, grad_P: Tensor):
        return grad_P.index_select(0, *ctx.saved_tensors).view(ctx.shape), None, None, None


def permute(x_ND: Tensor, order: Permutation) -> Tensor:
    """Copy each token's row to each of its experts; returns [P, D]. Gathers both ways: no atomics, same bits."""
    return _Permute.apply(x_ND, order.source_P, order.row_R)


def permute_gates(gates_NK: Tensor, order: Permutation) -> Tensor:
    """Each row's gate [P]; 0 in padding, whose gradient is not read."""
    return _PermuteGates.apply(gates_NK, order.pair_P, order.row_R, None if order.tile == 1 else order.real_P)


def unpermute(y_PD: Tensor, order: Permutation, n_tokens: int) -> Tensor:
    """Sum each token's rows; returns [N, D]. The gradient of padding rows is garbage that a zero gate must stop."""
    return _Unpermute.apply(y_PD, order.source_P, order.row_R, n_tokens)


class _TiledGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PD: Tensor, weight_EFD: Tensor, expert_L: Tensor, tile: int) -> Tensor:
        ctx.save_for_backward(x_PD, weight_EFD, expert_L)
        ctx.tile = tile
        x_LtD = x_PD.view(-1, tile, x_PD.shape[-1])
        return torch.bmm(x_LtD, weight_EFD[expert_L].transpose(1, 2)).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad_PF: Tensor):
        x_PD, weight_EFD, expert_L = ctx.saved_tensors
        grad_LtF = grad_PF.contiguous().view(-1, ctx.tile, grad_PF.shape[-1])
        grad_x_LtD = torch.bmm(grad_LtF, weight_EFD[expert_L])
        grad_weight_LFD = torch.bmm(grad_LtF.transpose(1, 2), x_PD.view(-1, ctx.tile, x_PD.shape[-1]))
        # Tiles of an expert add up in fp32.
        grad_weight_EFD = torch.zeros_like(weight_EFD, dtype=torch.float32).index_add_(
            0, expert_L, grad_weight_LFD.float()
        )
        return grad_x_LtD.flatten(0, 1), grad_weight_EFD.to(weight_EFD.dtype), None, None


def grouped_gemm(x_PD: Tensor, weight_EFD: Tensor, order: Permutation) -> Tensor:
    """x @ weight[e]ᵀ for the rows of each expert e; returns [P, F]. Compact layout: D and F multiples of 16 bytes."""
    if order.tile == 1:
        return F.grouped_mm(x_PD, weight_EFD.transpose(-2, -1), offs=order.ends_E)
    return _TiledGemm.apply(x_PD, weight_EFD, order.expert_L, order.tile)
