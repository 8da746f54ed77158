"""Balance losses: what a router pays for uneven load. All are Σ f·P over experts or devices, 1 a layer when balanced.

f is the load, without gradient, and P the mean affinity, through which it is lowered:

- expert-level (DeepSeekMoE eq. 12, V2 eq. 23): f counts the experts visited. V3's sequence-wise loss (eq. 17-20) counts
  the K best affinities, whatever bias and groups made of the choice, and normalises affinities to sum 1. Switch's
  (2101.03961, eq. 4) is DeepSeekMoE's at K = 1, GShard's (2006.16668, algorithm 1, E² times) that of the first choices.
- device-level (V2 eq. 26): the same between the groups of experts.
- communication (V2 eq. 29): f counts the tokens that a device receives, K experts or one.

V2 and V3 average over the tokens of a sequence, and so do Switch and GShard here: their papers leave the group of
tokens open, and no loss then depends on how sequences are batched. Letters: N tokens in B sequences, E experts,
K chosen, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Routing


class BalanceWeights(NamedTuple):
    """What each loss is multiplied by; 0 leaves it out. V2's α₁, α₂ and α₃."""

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0


def balance_loss(config: ModelConfig, routing: Routing, batch: int, weights: BalanceWeights) -> Tensor:
    """The weighted losses of one layer, each averaged over the `batch` sequences; fp32 scalar."""
    if routing.scores_NE is None or not any(weights):
        return routing.gates_NK.new_zeros(())
    scores_BTE = routing.scores_NE.unflatten(0, (batch, -1))
    if config.score_function == "sigmoid":
        scores_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    probability_BE = scores_BTE.mean(1)
    losses = []
    if weights.expert or weights.device:
        counted_NK = counted_choices(config, routing)
        frequency_BE = _frequency(counted_NK.reshape(batch, -1), config.n_routed_experts)
        losses.append(weights.expert * _product(frequency_BE, probability_BE))
        if weights.device:
            groups = (config.n_groups, -1)
            frequency_BG = frequency_BE.unflatten(-1, groups).mean(-1)
            losses.append(weights.device * _product(frequency_BG, probability_BE.unflatten(-1, groups).sum(-1)))
    if weights.communication:
        probability_BG = probability_BE.unflatten(-1, (config.n_groups, -1)).sum(-1)
        losses.append(weights.communication * _product(_received(config, routing, batch), probability_BG))
    return torch.stack(losses).sum()


def counted_choices(config: ModelConfig, routing: Routing) -> Tensor:
    """The experts that f counts for each token."""
    if config.router == "gshard":
        return routing.indices_NK[:, :1]
    if config.score_function == "sigmoid":
        assert routing.scores_NE is not None
        return routing.scores_NE.detach().topk(config.n_activated_experts, dim=-1).indices
    return routing.indices_NK


def _frequency(chosen_BX: Tensor, n_experts: int) -> Tensor:
    """Each expert's share of a sequence's choices, times E."""
    count_BE = torch.zeros(len(chosen_BX), n_experts, device=chosen_BX.device)
    count_BE.scatter_add_(1, chosen_BX, torch.ones_like(chosen_BX, dtype=count_BE.dtype))
    return count_BE * (n_experts / chosen_BX.shape[1])


def _received(config: ModelConfig, routing: Routing, batch: int) -> Tensor:
    """V2 eq. 30: the share of a sequence's tokens that each group receives, times G over the groups a token may use."""
    group_NK = routing.indices_NK // (config.n_routed_experts // config.n_groups)
    sent_NG = torch.zeros(len(group_NK), config.n_groups, device=group_NK.device).scatter_(1, group_NK, 1.0)
    return sent_NG.unflatten(0, (batch, -1)).mean(1) * (config.n_groups / config.n_limited_groups)


def _product(frequency_BX: Tensor, probability_BX: Tensor) -> Tensor:
    return (frequency_BX * probability_BX).sum(-1).mean()
