"""Routing: which experts a token visits, with which gates, and the biases that keep the experts evenly loaded.

| `router`, `score_function` | affinities | choice | gates |
|-|-|-|-|
| deepseek, sigmoid: V3 (2412.19437, section 2.1.2) | sigmoid | K best with bias, in the best groups by two | sum to 1 |
| deepseek, softmax: V2 (2405.04434, section 2.2.2) | softmax | K best, in the best groups by one | affinities |
| the same, one group: DeepSeekMoE (2401.06066, section 3) | softmax | K best | affinities |
| gshard (2006.16668, algorithm 1) | softmax | 2 best | sum to 1 |
| switch (2101.03961, section 2.1) | softmax | the best | affinities |
| hash (2106.04426, section 3) | none | a fixed random hash of the token id | 1 |

Loss-Free Balancing (2408.15664) is V3's: after each step the bias of an overloaded expert falls by γ and that of an
underloaded one rises. GShard's random dispatch to the second expert is left out: its authors' code has it off by
default, and DeepSeekMoE, whose baseline this is, does not mention it. Balance losses are in `model.balance`, capacities
in `model.dropping`. Letters: N tokens, E experts, K chosen, D width, L layers with experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model.config import ModelConfig


class Routing(NamedTuple):
    """Gates [N, K] (fp32), chosen experts [N, K] (int64), affinities [N, E] (fp32; None where none are learnt)."""

    gates_NK: Tensor
    indices_NK: Tensor
    scores_NE: Tensor | None


def build_router(config: ModelConfig) -> Router | HashRouter:
    return HashRouter(config) if config.router == "hash" else Router(config)


class Router(nn.Module):
    """Affinities, choice and gates by a learnt matrix, all in fp32 whatever the model computes in."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sigmoid = config.score_function == "sigmoid"
        self.rule = kernels.RoutingRule(
            sigmoid=sigmoid,
            renormalised=sigmoid or config.router == "gshard",
            n_activated=config.n_activated_experts,
            n_groups=config.n_groups,
            n_limited_groups=config.n_limited_groups,
            group_top=2 if sigmoid else 1,
            scale=config.route_scale,
        )
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.d_model))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Routing:
        """Routes by the states; the token ids are `HashRouter`'s."""
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        return Routing(*kernels.route(logits_NE, self.bias.float(), self.rule))


class HashRouter(nn.Module):
    """Nothing is learnt: a token id goes to the same expert for ever, in every layer to the one of the same number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_experts, self.route_scale = config.n_routed_experts, config.route_scale

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Routing:
        indices_NK = (scramble(tokens_N) % self.n_experts)[:, None]
        gates_NK = torch.full(indices_NK.shape, self.route_scale, device=x_ND.device)
        return Routing(gates_NK, indices_NK, None)


def scramble(numbers: Tensor) -> Tensor:
    """A fixed pseudo-random bijection of [0, 2³²), int64 to int64: the finalizer of MurmurHash3.

    Chance that must not depend on batch, rank, step or a generator's state comes from here.
    """
    mask = 0xFFFFFFFF
    x = numbers & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


@torch.no_grad()
def update_routing_bias(model: nn.Module, load_LE: Tensor, gamma: float) -> None:
    """Move every router's bias by γ towards even load; a hash has none.

    `load_LE` is `Output.load_LE`, tokens per expert, summed by the caller over micro-batches and ranks; its rows are
    in the order of the model's routers.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return
    assert load_LE.shape[0] == len(routers), (load_LE.shape, len(routers))
    load_LE = load_LE.float()
    step_LE = gamma * (load_LE.mean(-1, keepdim=True) - load_LE).sign()
    for router, step_E in zip(routers, step_LE, strict=True):
        router.bias += step_E.to(router.bias)
