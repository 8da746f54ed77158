"""Routing: which experts a token visits, and what keeps them evenly loaded.

V3 (section 2.1.2) and Loss-Free Balancing (2408.15664): affinities are sigmoids, a bias per expert takes part in the
choice and in nothing else, and after each step the bias of an overloaded expert falls by γ and that of an
underloaded one rises. V2 and DeepSeekMoE: affinities are a softmax, gates are not renormalised, no bias.
Letters: N tokens, B sequences of T tokens, E experts, K chosen, D width, L layers with experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model.config import ModelConfig


class Router(nn.Module):
    """Affinities, choice and gates, all in fp32 whatever the model computes in."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sigmoid = config.score_function == "sigmoid"
        self.n_activated = config.n_activated_experts
        self.n_groups, self.n_limited_groups = config.n_groups, config.n_limited_groups
        self.route_scale = config.route_scale
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.d_model))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [N, K] (fp32), chosen experts [N, K] (int64) and affinities [N, E] (fp32)."""
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if self.sigmoid else logits_NE.softmax(-1)
        indices_NK = kernels.route(
            scores_NE.detach(),
            self.bias.float(),
            self.n_activated,
            self.n_groups,
            self.n_limited_groups,
            group_top=2 if self.sigmoid else 1,
        )
        gates_NK = scores_NE.gather(1, indices_NK)
        if self.sigmoid:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
        return gates_NK * self.route_scale, indices_NK, scores_NE


def sequence_balance_loss(scores_NE: Tensor, indices_NK: Tensor, batch: int) -> Tensor:
    """V3 equations 17-20 without their α: Σ_e f_e·P_e for each sequence, averaged over the batch; 1 when balanced.

    f_e counts the experts really visited, bias included, since that is the load to be balanced.
    """
    scores_BTE = scores_NE.unflatten(0, (batch, -1))
    n_experts, n_activated = scores_NE.shape[1], indices_NK.shape[1]
    chosen_BX = indices_NK.reshape(batch, -1)
    counts_BE = scores_BTE.new_zeros(batch, n_experts).scatter_add_(1, chosen_BX, torch.ones_like(chosen_BX).float())
    frequency_BE = counts_BE * (n_experts / (n_activated * scores_BTE.shape[1]))
    probability_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (frequency_BE * probability_BE).sum(-1).mean()


@torch.no_grad()
def update_routing_bias(model: nn.Module, load_LE: Tensor, gamma: float) -> None:
    """Move every router's bias by γ towards even load.

    `load_LE` is `Output.load_LE`, tokens per expert, summed by the caller over micro-batches and ranks; its rows are
    in the order of the model's routers.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert load_LE.shape[0] == len(routers), (load_LE.shape, len(routers))
    load_LE = load_LE.float()
    step_LE = gamma * (load_LE.mean(-1, keepdim=True) - load_LE).sign()
    for router, step_E in zip(routers, step_LE, strict=True):
        router.bias += step_E.to(router.bias)
