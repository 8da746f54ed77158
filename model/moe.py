"""DeepSeekMoE (2401.06066): shared experts that see every token, and routed experts of which each token visits K.

Letters: N tokens, P = N·K routed rows, D model width, F expert width, E experts, K chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from model.config import ModelConfig
from model.layers import SwiGLU
from model.router import Router, sequence_balance_loss


class Balance(NamedTuple):
    """What one MoE layer reports: tokens per routed expert, int64, and the sequence-wise loss (fp32 scalar)."""

    load_E: Tensor
    loss: Tensor


class Experts(nn.Module):
    """All routed experts of a layer as two stacked matrices, run as grouped products over rows sorted by expert.

    Gates scale the hidden rows: `down` is linear, so that is the same sum, over F numbers a row in place of D.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_experts, d_model, width = config.n_routed_experts, config.d_model, config.moe_d_ff
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * width, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, width))

    def forward(self, x_ND: Tensor, gates_NK: Tensor, order: kernels.Permutation) -> Tensor:
        x_PD = kernels.permute(x_ND, order)
        gates_P = kernels.permute_gates(gates_NK, order)
        h_PF = kernels.swiglu(kernels.grouped_gemm(x_PD, self.gate_up.to(x_ND.dtype), order), gates_P)
        return kernels.unpermute(kernels.grouped_gemm(h_PF, self.down.to(x_ND.dtype), order), order, len(x_ND))


class MoE(nn.Module):
    """Router, routed experts and shared experts (side by side as one SwiGLU of n_shared · F)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_experts = config.n_routed_experts
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_d_ff
        self.shared = SwiGLU(config.d_model, shared) if shared else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Balance]:
        x_ND = x_BTD.flatten(0, 1)
        gates_NK, indices_NK, scores_NE = self.router(x_ND)
        order = kernels.permutation(indices_NK, self.n_experts, x_ND.dtype)
        y_ND = self.experts(x_ND, gates_NK, order)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), Balance(order.load_E, sequence_balance_loss(scores_NE, indices_NK, len(x_BTD)))

    def decode(self, x_ND: Tensor) -> Tensor:
        """`forward` without the bookkeeping of balance, and under `torch.inference_mode` without that of a backward."""
        gates_NK, indices_NK, _ = self.router(x_ND)
        if torch.is_inference_mode_enabled() and kernels.compact(x_ND.device, x_ND.dtype):
            weights = self.experts.gate_up, self.experts.down
            y_ND = kernels.routed_experts(x_ND, gates_NK, indices_NK, *(w.to(x_ND.dtype) for w in weights))
        else:
            y_ND = self.experts(x_ND, gates_NK, kernels.permutation(indices_NK, self.n_experts, x_ND.dtype))
        return y_ND if self.shared is None else y_ND.add_(self.shared(x_ND))
