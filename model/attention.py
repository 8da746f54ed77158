"""Attention: grouped-query (GQA) and DeepSeek's multi-head latent attention (MLA; V2 section 2.1, V3 section 2.1.1).

Both project the input once (`qkv`, one concatenated matrix), can attend over a whole sequence (`forward`), and can
attend over a cache (`prefill` then `decode`, which takes one token a row or a few). A cache (`model.cache`) keeps of
each token:

- MLA: C + R numbers, the normalised latent and the rotated shared key, nothing per head. Decoding never rebuilds
  keys or values: W_UK is absorbed into the query and W_UV applied after the weighted sum of latents, so a token
  is multi-query attention with heads of width C + R.
- GQA: 2·KV·Dh numbers, the keys of every head, then the values.

Letters: B batch, T query tokens, S cache slots, D model width, H heads, KV key/value heads, Dh head width, N/R/Vh
widths of a head's unrotated part, rotary part and value, C = kv_lora_rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from infra.errors import ConfigError
from model.cache import Cache, Float8Cache, Step
from model.checkpointing import plain
from model.config import ModelConfig
from model.layers import Linear, RMSNorm
from model.rope import Rotation, softmax_scale

LATENT_EPS = 1e-6  # of the norms on the latents: a constant in every published implementation


class GroupedQueryAttention(nn.Module):
    """Softmax attention whose H query heads share KV key/value heads.

    The qwen2 family has biases on q, k and v; the qwen3 family a norm over each query and key head before RoPE.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.scale = softmax_scale(config)
        width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = Linear(config.d_model, width, bias=config.family == "qwen2")
        normed = config.family == "qwen3"
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if normed else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if normed else None
        self.out = Linear(self.n_heads * self.head_dim, config.d_model)

    def forward(self, x_BTD: Tensor, rope: Rotation, visible: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        """Attend within the sequence, causally; inside documents where `visible` is `kernels.visibility` of them. A
        `norm` is applied to x first."""
        return self._attend(*self._project(x_BTD, rope, norm), visible)

    def cache(self, float8: bool = False) -> Cache:
        """An empty cache; ConfigError if it should be float8, which is for MLA's latent."""
        if float8:
            raise ConfigError("a float8 cache keeps MLA's latent, and this model has none: drop cache_dtype")
        return Cache(2 * self.n_kv_heads * self.head_dim)

    def prefill(self, x_BTD: Tensor, rope: Rotation, cache: Cache) -> Tensor:
        """`forward`, causal, that also fills the cache."""
        q, k, v = self._project(x_BTD, rope)
        cache.fill(torch.cat([k, v], dim=1).transpose(1, 2).flatten(2))
        return self._attend(q, k, v, None)

    def decode(self, x_BTD: Tensor, step: Step, cache: Cache) -> Tensor:
        """Keep T new tokens a row, then let each see the slots that the step's mask leaves it."""
        q, k, v = self._project(x_BTD, step.rope)
        cache.write(step.index_N, torch.cat([k, v], dim=1).transpose(1, 2).flatten(0, 1).flatten(1))
        cached_BSXd = cache.read(len(x_BTD), step.mask_BTS.shape[-1]).unflatten(
            -1, (2 * self.n_kv_heads, self.head_dim)
        )
        k_BKSd, v_BKSd = cached_BSXd.transpose(1, 2).chunk(2, dim=1)
        # The T·G queries of one key/value head stand where a sequence would: no key is repeated.
        groups = self.n_heads // self.n_kv_heads
        q_BKXd = q.unflatten(1, (-1, groups)).transpose(2, 3).flatten(2, 3)
        mask_BTS = step.mask_BTS if x_BTD.shape[1] == 1 else step.mask_BTS.repeat_interleave(groups, dim=1)
        y_BKXd = F.scaled_dot_product_attention(q_BKXd, k_BKSd, v_BKSd, attn_mask=mask_BTS[:, None], scale=self.scale)
        return self.out(y_BKXd.unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4).flatten(2))

    def _project(self, x_BTD: Tensor, rope: Rotation, norm: RMSNorm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        heads_BTHd = self.qkv(x_BTD, norm).unflatten(-1, (-1, self.head_dim))
        qk, v = heads_BTHd.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = kernels.apply_rope(qk, *rope.per_head())
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(self, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, visible: Tensor | None) -> Tensor:
        y_BHTd = kernels.attention(q_BHTd, k_BKTd, v_BKTd, visible, self.scale)
        return self.out(y_BHTd.transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    """MLA. `qkv` rows: the query (or its latent, with q_lora_rank), then the key/value latent, then the shared key."""

    recompute = staticmethod(plain)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.kv_lora_rank and config.qk_nope_head_dim
        self.n_heads, self.rank = config.n_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim, self.value_dim = config.qk_nope_head_dim, config.rope_dim, config.value_dim
        self.scale = softmax_scale(config)
        query = self.n_heads * config.head_dim
        self.query_width = config.q_lora_rank or query
        self.qkv = Linear(config.d_model, self.query_width + self.rank + self.rope_dim)
        if config.q_lora_rank:
            self.q_norm: RMSNorm | None = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_up: Linear | None = Linear(config.q_lora_rank, query)
        else:
            self.q_norm = self.q_up = None
        self.kv_norm = RMSNorm(self.rank, LATENT_EPS)
        self.kv_up = Linear(self.rank, self.n_heads * (self.nope_dim + self.value_dim))
        self.out = Linear(self.n_heads * self.value_dim, config.d_model)

    def forward(self, x_BTD: Tensor, rope: Rotation, visible: Tensor | None, norm: RMSNorm | None = None) -> Tensor:
        """Attend within the sequence, causally; inside documents where `visible` is `kernels.visibility` of them. A
        `norm` is applied to x first."""
        return self._attend(*self.recompute("mla_up", self._up, *self._compress(x_BTD, norm), rope), visible)

    def cache(self, float8: bool = False) -> Cache:
        """An empty cache, its latents in float8 or in the dtype of the activations."""
        width = self.rank + self.rope_dim
        return Float8Cache(width, self.rank) if float8 else Cache(width)

    def prefill(self, x_BTD: Tensor, rope: Rotation, cache: Cache) -> Tensor:
        """`forward`, causal, that also fills the cache."""
        q_BTHd, latent_BTL = self._project(x_BTD, rope)
        cache.fill(latent_BTL)
        return self._attend(*self._per_head(q_BTHd, latent_BTL), None)

    def decode(self, x_BTD: Tensor, step: Step, cache: Cache) -> Tensor:
        """Keep T new tokens a row, then let each see the slots that the step's mask leaves it."""
        batch, length, _ = x_BTD.shape
        q_BTHd, latent_BTL = self._project(x_BTD, step.rope)
        cache.write(step.index_N, latent_BTL.flatten(0, 1))
        up_HUC = self.kv_up.weight.view(self.n_heads, -1, self.rank)
        key_HnC, value_HvC = up_HUC.split([self.nope_dim, self.value_dim], dim=1)
        q_NHn, q_NHr = q_BTHd.flatten(0, 1).split([self.nope_dim, self.rope_dim], dim=-1)
        q_HNC = torch.bmm(q_NHn.transpose(0, 1), key_HnC)
        cached_BSL = cache.read(batch, step.mask_BTS.shape[-1])
        y_NHC = kernels.latent_attention(
            q_HNC.transpose(0, 1), q_NHr, cached_BSL, step.position_BT, step.mask_BTS, self.scale
        )
        y_HNv = torch.bmm(y_NHC.transpose(0, 1), value_HvC.transpose(1, 2))
        return self.out(y_HNv.permute(1, 0, 2).flatten(1)).view(batch, length, -1)

    def _project(self, x_BTD: Tensor, rope: Rotation) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, N + R] and what is cached [B, T, C + R], both with their last R dims rotated."""
        return self._rotate(*self._compress(x_BTD), rope)

    def _compress(self, x_BTD: Tensor, norm: RMSNorm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The query (or its latent), the key/value latent and the shared key, neither normalised nor rotated."""
        return self.qkv(x_BTD, norm).split([self.query_width, self.rank, self.rope_dim], dim=-1)

    def _rotate(self, q: Tensor, latent: Tensor, key: Tensor, rope: Rotation) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(q, self.q_norm)
        q_BTHd = kernels.apply_rope(q.unflatten(-1, (self.n_heads, -1)), *rope.per_head())
        return q_BTHd, kernels.apply_rope(torch.cat([self.kv_norm(latent), key], dim=-1), *rope)

    def _attend(self, q_BHTd: Tensor, k_BHTd: Tensor, v_BHTv: Tensor, visible: Tensor | None) -> Tensor:
        y_BHTv = kernels.attention(q_BHTd, k_BHTd, v_BHTv, visible, self.scale)
        return self.out(y_BHTv.transpose(1, 2).flatten(2))

    def _up(self, q: Tensor, latent: Tensor, key: Tensor, rope: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self._per_head(*self._rotate(q, latent, key, rope))

    def _per_head(self, q_BTHd: Tensor, latent_BTL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, [B, H, T, N + R] twice and [B, H, T, Vh]."""
        latent_BTC, key_BTR = latent_BTL.split([self.rank, self.rope_dim], dim=-1)
        up_BTHU = self.kv_up(latent_BTC).unflatten(-1, (self.n_heads, -1))
        k_BTHd, v_BTHv = kernels.keys_and_values(up_BTHU, key_BTR, self.nope_dim)
        return q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHv.transpose(1, 2)
