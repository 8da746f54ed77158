"""Plain-torch definitions of the model's tensor operations: what every faster implementation is compared with.

Each function is differentiable, works in any floating dtype on any device, and accumulates in fp32 where its
docstring says so. Letters: N rows (tokens), D width, F expert width, E experts, K experts chosen per token,
P = N·K routed rows, V vocabulary, G expert groups, R rotary dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; statistics in fp32, result in x's dtype."""
    return F.rms_norm(x_ND, weight_D.shape, weight_D.to(x_ND.dtype), eps)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) · up, where the last dimension holds [gate, up]; returns [..., F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def apply_rope(x_NR: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + R/2]) by the angles whose cosines and sines are given (broadcast over N)."""
    a, b = x_NR.chunk(2, dim=-1)
    return torch.cat([a * cos_NR2 - b * sin_NR2, b * cos_NR2 + a * sin_NR2], dim=-1)


def route(
    scores_NE: Tensor,
    bias_E: Tensor,
    n_activated: int,
    n_groups: int,
    n_limited_groups: int,
    group_top: int,
) -> Tensor:
    """Choose experts: the K best of `scores + bias` inside the best groups. Returns indices_NK (int64).

    A group's score is the sum of its `group_top` best biased affinities: 2 in DeepSeek-V3 (section 2.1.2), 1 in
    DeepSeek-V2 (section 2.2.2). The bias steers the choice alone; gate values come from the scores.
    """
    choice_NE = scores_NE + bias_E
    if n_limited_groups < n_groups:
        choice_NGe = choice_NE.unflatten(-1, (n_groups, -1))
        group_NG = choice_NGe.topk(group_top, dim=-1).values.sum(-1)
        kept_NG = torch.zeros_like(group_NG, dtype=torch.bool)
        kept_NG.scatter_(1, group_NG.topk(n_limited_groups, dim=-1).indices, True)
        choice_NE = choice_NGe.masked_fill(~kept_NG[..., None], float("-inf")).flatten(-2)
    return choice_NE.topk(n_activated, dim=-1).indices


class Permutation(NamedTuple):
    """How routed rows are laid out expert by expert.

    source_P: token of each row, sorted by expert. row_P: row of each (token, choice) pair, token-major: the inverse
    order. load_E: rows per expert, int64. ends_E: where each expert's rows end, int32.
    """

    source_P: Tensor  # noqa: N815
    row_P: Tensor  # noqa: N815
    load_E: Tensor  # noqa: N815
    ends_E: Tensor  # noqa: N815


def permutation(indices_NK: Tensor, n_experts: int) -> Permutation:
    """The stable order that gathers every expert's rows together."""
    flat_P = indices_NK.flatten()
    order_P = flat_P.argsort(stable=True)
    row_P = torch.empty_like(order_P)
    row_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    load_E = torch.zeros(n_experts, dtype=torch.int64, device=flat_P.device)
    load_E.scatter_add_(0, flat_P, torch.ones_like(flat_P))
    return Permutation(order_P // indices_NK.shape[1], row_P, load_E, load_E.cumsum(0).to(torch.int32))


def permute(x_ND: Tensor, order: Permutation) -> Tensor:
    """Copy each token's row to each of its experts; returns [P, D], expert by expert."""
    return x_ND.index_select(0, order.source_P)


def unpermute(y_PD: Tensor, gates_NK: Tensor, order: Permutation) -> Tensor:
    """Sum each token's expert outputs, weighted by its gates; returns [N, D]."""
    n_tokens, n_activated = gates_NK.shape
    y_NKD = y_PD.index_select(0, order.row_P).view(n_tokens, n_activated, -1)
    return torch.bmm(gates_NK.to(y_PD.dtype).unsqueeze(1), y_NKD).squeeze(1)


def grouped_gemm(x_PD: Tensor, weight_EFD: Tensor, order: Permutation) -> Tensor:
    """x @ weight[e]ᵀ for the rows of each expert e; returns [P, F]. D and F: multiples of 16 bytes."""
    return F.grouped_mm(x_PD, weight_EFD.transpose(-2, -1), offs=order.ends_E)
