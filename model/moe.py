"""DeepSeekMoE (2401.06066): shared experts that see every token, and routed experts of which each token visits K.

Letters: B sequences of T tokens, N = B·T, P = N·K routed rows, D model width, F expert width, E experts, K chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from kernels import fp8
from model.checkpointing import plain
from model.config import ModelConfig
from model.dropping import kept_rows
from model.float8 import Float8, in_float8
from model.layers import SwiGLU
from model.router import Routing, build_router


class Balance(NamedTuple):
    """What one MoE layer reports.

    load_E: rows that chose each routed expert, int64. dropped: how many of them were over capacity, int64 scalar; None
    where none can be. routing: what the balance losses are made of.
    """

    load_E: Tensor
    dropped: Tensor | None
    routing: Routing


class Experts(nn.Module):
    """All routed experts of a layer as two stacked matrices, run as grouped products over rows sorted by expert.

    Gates scale the hidden rows: `down` is linear, so that is the same sum, over F numbers a row in place of D.
    """

    float8: Float8 | None = None
    recompute = staticmethod(plain)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_experts, d_model, width = config.n_routed_experts, config.d_model, config.moe_d_ff
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * width, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, width))

    def order(self, indices_NK: Tensor, dtype: torch.dtype) -> kernels.Permutation:
        """How rows are laid out for the products that `forward` makes."""
        if not in_float8(self):
            return kernels.permutation(indices_NK, len(self.down), dtype)
        return kernels.layout(indices_NK, len(self.down), fp8.BLOCK)

    def forward(self, x_ND: Tensor, gates_NK: Tensor, order: kernels.Permutation) -> Tensor:
        if in_float8(self):
            return fp8.experts(x_ND, gates_NK, self.gate_up, self.down, order)
        x_PD = kernels.permute(x_ND, order)
        gates_P = kernels.permute_gates(gates_NK, order)
        gate_up_P2F = kernels.grouped_gemm(x_PD, self.gate_up, order)
        h_PF = self.recompute("swiglu", kernels.swiglu, gate_up_P2F, gates_P)
        return kernels.unpermute(kernels.grouped_gemm(h_PF, self.down, order), order, len(x_ND))


class MoE(nn.Module):
    """Router, routed experts and shared experts (side by side as one SwiGLU of n_shared · F)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_d_ff
        self.shared = SwiGLU(config.d_model, shared) if shared else None

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Balance]:
        """`tokens_BT` are the ids that the states stand at. Rows over capacity are dropped in training mode alone."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND, tokens_BT.flatten())
        gates_NK, dropped = routing.gates_NK, None
        if self.training and self.config.capacity_factor is not None:
            kept_NK = kept_rows(self.config, routing, tokens_BT)
            gates_NK, dropped = gates_NK * kept_NK, (~kept_NK).sum()
        order = self.experts.order(routing.indices_NK, x_ND.dtype)
        y_ND = self.experts(x_ND, gates_NK, order)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), Balance(order.load_E, dropped, routing)

    def decode(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """`forward` that drops nothing and keeps no balance, nor anything for a backward pass in inference mode."""
        gates_NK, indices_NK, _ = self.router(x_ND, tokens_N)
        bare = kernels.inference.suits(x_ND) and not in_float8(self.experts)
        if bare and kernels.compact(x_ND.device, x_ND.dtype):
            y_ND = kernels.routed_experts(x_ND, gates_NK, indices_NK, self.experts.gate_up, self.experts.down)
        else:
            order = self.experts.order(indices_NK, x_ND.dtype)
            y_ND = self.experts(x_ND, gates_NK, order)
        return y_ND if self.shared is None else y_ND.add_(self.shared(x_ND))
