"""The decoder: embedding, pre-norm blocks, final norm, head, and multi-token-prediction modules.

Letters: B batch, T tokens, D model width, V vocabulary, L layers with experts, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from model.attention import GroupedQueryAttention, LatentAttention
from model.balance import BalanceWeights, balance_loss
from model.cache import Cache, Step
from model.checkpointing import plain
from model.config import ModelConfig
from model.layers import Linear, RMSNorm, SwiGLU
from model.moe import Balance, MoE
from model.rope import Rotation, rotation
from model.router import Router


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the FFN is dense or a mixture of experts by `layer`."""

    recompute = staticmethod(plain)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = LatentAttention(config) if config.is_mla else GroupedQueryAttention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = MoE(config) if config.has_experts(layer) else SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, rope: Rotation, visible: Tensor | None
    ) -> tuple[Tensor, Balance | None]:
        return self.recompute("block", self._forward, x_BTD, tokens_BT, rope, visible)

    def _forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, rope: Rotation, visible: Tensor | None
    ) -> tuple[Tensor, Balance | None]:
        attended_BTD = self.attention(x_BTD, rope, visible, self.attention_norm)
        x_BTD, h_BTD = self.ffn_norm.add(x_BTD, attended_BTD)
        if isinstance(self.ffn, MoE):
            y_BTD, balance = self.ffn(h_BTD, tokens_BT)
            return x_BTD + y_BTD, balance
        return x_BTD + self.ffn(h_BTD), None

    def prefill(self, x_BTD: Tensor, tokens_BT: Tensor, rope: Rotation, cache: Cache) -> Tensor:
        """`forward`, causal, that fills the cache and keeps no balance."""
        return self._feed(x_BTD, self.attention.prefill(self.attention_norm(x_BTD), rope, cache), tokens_BT)

    def decode(self, x_BTD: Tensor, tokens_BT: Tensor, step: Step, cache: Cache) -> Tensor:
        """The next T tokens of each row, after those in the cache."""
        return self._feed(x_BTD, self.attention.decode(self.attention_norm(x_BTD), step, cache), tokens_BT)

    def _feed(self, x_BTD: Tensor, attended_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        x_BTD, h_BTD = self.ffn_norm.add(x_BTD, attended_BTD)
        h_ND = h_BTD.flatten(0, 1)
        y_ND = self.ffn.decode(h_ND, tokens_BT.flatten()) if isinstance(self.ffn, MoE) else self.ffn(h_ND)
        return x_BTD + y_ND.view_as(x_BTD)


class MultiTokenPrediction(nn.Module):
    """One MTP module (V3, section 2.2): from the state at i and the token at i + k, the state that predicts i + k + 1.

    h^k_i = block(W [norm(emb(t_{i+k})); norm(h^{k-1}_i)]), the halves in the published weights' order. States go in
    and out behind their final norms, as the published inference code has it. Embedding and head are the main model's.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.d_model, config.norm_eps)
        self.hidden_norm = RMSNorm(config.d_model, config.norm_eps)
        self.projection = Linear(2 * config.d_model, config.d_model)
        self.block = Block(config, config.n_layers + depth)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, tokens_BT: Tensor, rope: Rotation, visible: Tensor | None
    ) -> tuple[Tensor, Balance | None]:
        x_BTD, balance = self.block(self._project(hidden_BTD, embedded_BTD), tokens_BT, rope, visible)
        return self.norm(x_BTD), balance

    def prefill(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, tokens_BT: Tensor, rope: Rotation, cache: Cache
    ) -> Tensor:
        """`forward`, causal, that fills the module's own cache and keeps no balance."""
        return self.norm(self.block.prefill(self._project(hidden_BTD, embedded_BTD), tokens_BT, rope, cache))

    def decode(self, hidden_BTD: Tensor, embedded_BTD: Tensor, tokens_BT: Tensor, step: Step, cache: Cache) -> Tensor:
        """The next T places of each row, after those in the cache."""
        return self.norm(self.block.decode(self._project(hidden_BTD, embedded_BTD), tokens_BT, step, cache))

    def _project(self, hidden_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        return self.projection(torch.cat([self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], dim=-1))


class Output:
    """What a forward pass gives. Logits are made when asked for: training reads `hidden_BTD` and never holds them.

    hidden_BTD: states behind the final norm. mtp_hidden: one [B, T − k, D] per MTP depth k = 1, 2, …
    load_LE: tokens per routed expert of each layer with experts (MTP's blocks last), int64; None for a dense model.
    dropped_L: how many of them were over capacity and dropped, int64; None where nothing can be.
    """

    def __init__(
        self,
        config: ModelConfig,
        head_VD: Tensor,
        hidden_BTD: Tensor,
        mtp_hidden: list[Tensor],
        balances: Iterable[Balance | None],
    ) -> None:
        self._config, self._head_VD = config, head_VD
        self._balances = [balance for balance in balances if balance is not None]
        self.hidden_BTD, self.mtp_hidden = hidden_BTD, mtp_hidden
        self.load_LE = torch.stack([balance.load_E for balance in self._balances]) if self._balances else None
        dropped = [balance.dropped for balance in self._balances if balance.dropped is not None]
        self.dropped_L = torch.stack(dropped) if dropped else None

    def balance_loss(self, weights: BalanceWeights) -> Tensor:
        """Σ over the layers with experts of their weighted balance losses, fp32 scalar; 0 for a dense model."""
        losses = [
            balance_loss(self._config, balance.routing, len(self.hidden_BTD), weights) for balance in self._balances
        ]
        return torch.stack(losses).sum() if losses else self.hidden_BTD.new_zeros((), dtype=torch.float32)

    @cached_property
    def logits_BTV(self) -> Tensor:  # noqa: N802
        """fp32 logits of the next token."""
        return self._logits(self.hidden_BTD)

    @cached_property
    def mtp_logits(self) -> list[Tensor]:
        """fp32 logits [B, T − k, V] per MTP depth k: entry i predicts token i + k + 1."""
        return [self._logits(hidden) for hidden in self.mtp_hidden]

    def log_probs(self, targets_BT: Tensor, temperature: float = 1.0, depth: int = 0) -> Tensor:
        """log p(target) of each position, fp32 [B, T], without holding logits; `depth` k reads MTP module k."""
        hidden = self.mtp_hidden[depth - 1] if depth else self.hidden_BTD
        assert hidden.shape[:2] == targets_BT.shape, (hidden.shape, targets_BT.shape)
        log_probs_N = kernels.linear_log_probs(hidden.flatten(0, 1), self._head_VD, targets_BT.flatten(), temperature)
        return log_probs_N.view_as(targets_BT)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._head_VD).float()


class Transformer(nn.Module):
    """A decoder-only language model of the given config, freshly initialised (weights fp32, N(0, init_std)).

    Activations and matrix products take the dtype of the embedding. Training in bf16 rounds `low_precision_weights`;
    norms and gates stay fp32, as in DeepSeek-V3 (section 3.3.1). `round_weights` does it for good, to read or to serve.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layers)])
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        self.mtp = nn.ModuleList([MultiTokenPrediction(config, depth) for depth in range(config.n_mtp)])
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices ~ N(0, init_std²) as the papers have it, norms 1, biases 0; from torch's global generator."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.init_std)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]: the embedding's when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def low_precision_weights(self) -> list[nn.Parameter]:
        """Embedding, head, and every weight of a linear layer or an expert: all but norms and gates."""
        kept = [module for module in self.modules() if isinstance(module, RMSNorm | Router)]
        exact = {parameter for module in kept for parameter in module.parameters()}
        return [parameter for parameter in self.parameters() if parameter not in exact]

    def round_weights(self) -> Self:
        """Round `low_precision_weights` to bf16, in place; returns the model."""
        for weight in self.low_precision_weights():
            weight.data = weight.data.bfloat16()
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of states behind the final norm."""
        return F.linear(hidden, self.head_weight).float()

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, document_BT: Tensor | None = None
    ) -> Output:
        """Predict every next token.

        `document_BT` numbers the documents packed into each sequence: attention then stays inside a document. Tokens
        numbered `kernels.PREFIX` are seen by all that come after them too.
        `positions_BT` defaults to 0 … T − 1 (RoPE is relative: packed documents need no restart).
        """
        assert tokens_BT.ndim == 2, tokens_BT.shape
        length = tokens_BT.shape[1]
        embedded_BTD = self.embedding(tokens_BT)
        positions = torch.arange(length, device=tokens_BT.device) if positions_BT is None else positions_BT
        rope = rotation(self.config, positions, embedded_BTD.dtype)
        visible = None if document_BT is None else kernels.visibility(document_BT)
        x_BTD, balances = embedded_BTD, []
        for block in self.blocks:
            x_BTD, balance = block(x_BTD, tokens_BT, rope, visible)
            balances.append(balance)
        hidden_BTD = self.norm(x_BTD)
        mtp_hidden: list[Tensor] = []
        for depth, module in enumerate(self.mtp, start=1):
            kept = slice(0, length - depth)
            previous = (mtp_hidden[-1] if mtp_hidden else hidden_BTD)[:, kept]
            short_rope = Rotation(rope.cos[..., kept, :], rope.sin[..., kept, :])
            short_visible = None if document_BT is None else kernels.visibility(document_BT[:, kept])
            hidden, balance = module(previous, embedded_BTD[:, depth:], tokens_BT[:, depth:], short_rope, short_visible)
            mtp_hidden.append(hidden)
            balances.append(balance)
        return Output(self.config, self.head_weight, hidden_BTD, mtp_hidden, balances)
