"""Attention: grouped-query (GQA) and DeepSeek's multi-head latent attention (MLA; V2 section 2.1, V3 section 2.1.1).

Both project the input once (`qkv`, one concatenated matrix), can attend over a whole sequence (`forward`), and can
attend over a cache (`prefill` then `decode`). A cache is a tensor that the caller owns:

- MLA: [B, S, C + R], the normalised latent and the rotated shared key, nothing per head. Decoding never rebuilds
  keys or values: W_UK is absorbed into the query and W_UV applied after the weighted sum of latents, so one token
  is multi-query attention with heads of width C + R.
- GQA: [B, 2·KV, S, Dh], keys then values.

Letters: B batch, T query tokens, S cache slots, D model width, H heads, KV key/value heads, Dh head width, N/R/Vh
widths of a head's unrotated part, rotary part and value, C = kv_lora_rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
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

    def forward(self, x_BTD: Tensor, rope: Rotation, mask_BTT: Tensor | None) -> Tensor:
        """Attend within the sequence: causally, or where `mask_BTT` is true (it must then be causal itself)."""
        return self._attend(*self._project(x_BTD, rope), mask_BTT)

    def cache(self, batch: int, slots: int) -> Tensor:
        return self.out.weight.new_empty(batch, 2 * self.n_kv_heads, slots, self.head_dim)

    def prefill(self, x_BTD: Tensor, rope: Rotation, mask_BTT: Tensor | None, cache: Tensor) -> Tensor:
        """`forward` that also writes the first T slots of the cache."""
        q, k, v = self._project(x_BTD, rope)
        cache[:, : self.n_kv_heads, : x_BTD.shape[1]] = k
        cache[:, self.n_kv_heads :, : x_BTD.shape[1]] = v
        return self._attend(q, k, v, mask_BTT)

    def decode(self, x_BD: Tensor, rope: Rotation, mask_BS: Tensor, cache: Tensor) -> Tensor:
        """One token per row into slot S − 1, with `mask_BS` (0 or -inf) added to the scores."""
        slots = mask_BS.shape[1]
        q, k, v = self._project(x_BD.unsqueeze(1), rope)
        cache[:, : self.n_kv_heads, slots - 1 : slots] = k
        cache[:, self.n_kv_heads :, slots - 1 : slots] = v
        # The queries of one key/value head stand where a sequence would: no key is repeated.
        q_BKGd = q.view(q.shape[0], self.n_kv_heads, -1, self.head_dim)
        k_BKSd, v_BKSd = cache[:, :, :slots].chunk(2, dim=1)
        y_BKGd = F.scaled_dot_product_attention(
            q_BKGd, k_BKSd, v_BKSd, attn_mask=mask_BS[:, None, None, :], scale=self.scale
        )
        return self.out(y_BKGd.flatten(1))

    def _project(self, x_BTD: Tensor, rope: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        heads_BTHd = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk, v = heads_BTHd.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = kernels.apply_rope(qk, *rope.per_head())
        q, k = qk.split([self.n_heads, self.n_kv_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _attend(self, q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, mask_BTT: Tensor | None) -> Tensor:
        repeats = self.n_heads // self.n_kv_heads
        k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k_BKTd, v_BKTd))
        return self.out(_attend(q_BHTd, k, v, mask_BTT, self.scale))


class LatentAttention(nn.Module):
    """MLA. `qkv` rows: the query (or its latent, with q_lora_rank), then the key/value latent, then the shared key."""

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

    def forward(self, x_BTD: Tensor, rope: Rotation, mask_BTT: Tensor | None) -> Tensor:
        """Attend within the sequence: causally, or where `mask_BTT` is true (it must then be causal itself)."""
        return self._attend(*self._project(x_BTD, rope), mask_BTT)

    def cache(self, batch: int, slots: int) -> Tensor:
        return self.out.weight.new_empty(batch, slots, self.rank + self.rope_dim)

    def prefill(self, x_BTD: Tensor, rope: Rotation, mask_BTT: Tensor | None, cache: Tensor) -> Tensor:
        """`forward` that also writes the first T slots of the cache."""
        q_BTHd, latent_BTL = self._project(x_BTD, rope)
        cache[:, : x_BTD.shape[1]] = latent_BTL
        return self._attend(q_BTHd, latent_BTL, mask_BTT)

    def decode(self, x_BD: Tensor, rope: Rotation, mask_BS: Tensor, cache: Tensor) -> Tensor:
        """One token per row into slot S − 1, with `mask_BS` (0 or -inf) added to the scores."""
        slots = mask_BS.shape[1]
        q_BTHd, latent_BTL = self._project(x_BD.unsqueeze(1), rope)
        cache[:, slots - 1 : slots] = latent_BTL
        up_HUC = self.kv_up.weight.to(x_BD.dtype).view(self.n_heads, -1, self.rank)
        key_HnC, value_HvC = up_HUC.split([self.nope_dim, self.value_dim], dim=1)
        q_BHn, q_BHr = q_BTHd[:, 0].split([self.nope_dim, self.rope_dim], dim=-1)
        q_HBC = torch.bmm(q_BHn.transpose(0, 1), key_HnC)
        q_BHL = torch.cat([q_HBC.transpose(0, 1), q_BHr], dim=-1)
        # Heads stand where a sequence would. Keys and values are both the cache itself (a fused kernel wants equal
        # widths), so the sum's rotary part is computed and dropped.
        cache_B1SL = cache[:, None, :slots]
        y_B1HL = F.scaled_dot_product_attention(
            q_BHL.unsqueeze(1), cache_B1SL, cache_B1SL, attn_mask=mask_BS[:, None, None, :], scale=self.scale
        )
        y_HBC = y_B1HL[:, 0, :, : self.rank].transpose(0, 1)
        y_HBv = torch.bmm(y_HBC, value_HvC.transpose(1, 2))
        return self.out(y_HBv.transpose(0, 1).flatten(1))

    def _project(self, x_BTD: Tensor, rope: Rotation) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, N + R] and what is cached [B, T, C + R], both with their last R dims rotated."""
        q, latent, key = self.qkv(x_BTD).split([self.query_width, self.rank, self.rope_dim], dim=-1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q_BTHd = kernels.apply_rope(q.unflatten(-1, (self.n_heads, -1)), *rope.per_head())
        return q_BTHd, kernels.apply_rope(torch.cat([self.kv_norm(latent), key], dim=-1), *rope)

    def _attend(self, q_BTHd: Tensor, latent_BTL: Tensor, mask_BTT: Tensor | None) -> Tensor:
        latent_BTC, key_BTR = latent_BTL.split([self.rank, self.rope_dim], dim=-1)
        up_BTHU = self.kv_up(latent_BTC).unflatten(-1, (self.n_heads, -1))
        k_nope, v = up_BTHU.split([self.nope_dim, self.value_dim], dim=-1)
        k_BTHd = torch.cat([k_nope, key_BTR.unsqueeze(2).expand(-1, -1, self.n_heads, -1)], dim=-1)
        return self.out(
            _attend(q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v.transpose(1, 2), mask_BTT, self.scale)
        )


def _attend(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTv: Tensor, mask_BTT: Tensor | None, scale: float) -> Tensor:
    """Causal attention, or attention where the mask is true; returns [B, T, H·Vh]."""
    width = v_BHTv.shape[-1]
    # A fused kernel wants equal widths: zero columns are cheaper than the unfused path (3x on CPU).
    v = F.pad(v_BHTv, (0, q_BHTd.shape[-1] - width)) if width < q_BHTd.shape[-1] else v_BHTv
    mask = None if mask_BTT is None else mask_BTT.unsqueeze(1)
    y = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y[..., :width].transpose(1, 2).flatten(2)
