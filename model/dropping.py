"""Token dropping: a training step computes no more rows than a capacity; a token passes by what is over it.

- deepseek (V2, section 2.2.4): capacity is a device's, which is a group of experts; the rows of the lowest affinity are
  dropped, and about 10 % of the sequences lose none, so that a model served without dropping has seen that too.
- gshard (2006.16668, section 2.2), switch (2101.03961, section 2.2), and hash alike: capacity is an expert's; rows are
  served in the order of the tokens, all first choices before any second.

Capacity is capacity_factor × even load. The papers take it over whatever batch a device holds; here it is taken over
each sequence, and the spared sequences are known by a hash of their tokens. What is dropped is then a function of the
sequence and the weights: no micro-batch, number of ranks or resume changes it. A sequence is less even than a batch, so
more is dropped. A dropped row keeps its place in the layout, with gate 0: it costs its products and changes nothing.
Letters: B sequences of T tokens, N = B·T, K choices a token, P = T·K rows of a sequence, X buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Routing, scramble

SPARED = 0.1  # share of sequences whose rows are never dropped (V2, section 2.2.4)


def kept_rows(config: ModelConfig, routing: Routing, tokens_BT: Tensor) -> Tensor:
    """Which of the chosen rows are computed, bool [N, K]."""
    assert config.capacity_factor is not None
    batch, length = tokens_BT.shape
    indices_BP = routing.indices_NK.view(batch, -1)
    n_rows = indices_BP.shape[1]
    if config.router == "deepseek":
        assert routing.scores_NE is not None
        n_buckets, bucket_BP = config.n_groups, indices_BP // (config.n_routed_experts // config.n_groups)
        affinity_BP = routing.scores_NE.detach().gather(1, routing.indices_NK).view(batch, -1)
        order_BP = affinity_BP.argsort(dim=-1, descending=True, stable=True)
    else:
        n_buckets, bucket_BP = config.n_routed_experts, indices_BP
        order_BP = torch.arange(n_rows, device=tokens_BT.device).view(length, -1).T.reshape(1, -1).expand(batch, -1)
    capacity = math.ceil(config.capacity_factor * n_rows / n_buckets)
    kept_BP = _served(bucket_BP, order_BP, n_buckets, capacity)
    if config.router == "deepseek":
        kept_BP |= spared(tokens_BT)[:, None]
    return kept_BP.view_as(routing.indices_NK)


def _served(bucket_BP: Tensor, order_BP: Tensor, n_buckets: int, capacity: int) -> Tensor:
    """Whether a row is among the first `capacity` of its bucket, in the order given."""
    queue_BP = order_BP.gather(1, bucket_BP.gather(1, order_BP).argsort(dim=-1, stable=True))  # bucket after bucket
    size_BX = bucket_BP.new_zeros(len(bucket_BP), n_buckets).scatter_add_(1, bucket_BP, torch.ones_like(bucket_BP))
    start_BX = size_BX.cumsum(-1) - size_BX
    place_BP = torch.arange(bucket_BP.shape[1], device=bucket_BP.device) - start_BX.gather(
        1, bucket_BP.gather(1, queue_BP)
    )
    return torch.empty_like(bucket_BP, dtype=torch.bool).scatter_(1, queue_BP, place_BP < capacity)


def spared(tokens_BT: Tensor) -> Tensor:
    """Which sequences lose nothing, bool [B]: the same ones whenever they are seen. MTP's shifted ones draw anew."""
    position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    digest_B = scramble(scramble(tokens_BT) + position_T).sum(-1)
    return scramble(digest_B) < SPARED * 2**32
