"""Plain-torch definitions of the model's tensor operations: what every faster implementation is compared with.

Each function is differentiable, works in any floating dtype on any device, and accumulates in fp32 where its
docstring says so. Letters: N rows (tokens), D width, F expert width, E experts, K experts chosen per token,
P = N·K routed rows, V vocabulary, G expert groups, R rotary dims. In attention: B sequences of T tokens, H query heads,
K key/value heads, d and v the widths of a key and of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PREFIX = -1  # as a document's number: what comes before all documents of a row, and is seen by each


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; statistics in fp32, result in x's dtype."""
    return F.rms_norm(x_ND, weight_D.shape, weight_D.to(x_ND.dtype), eps)


def swiglu(gate_up_N2F: Tensor, scale_N: Tensor | None = None) -> Tensor:
    """silu(gate) · up (· scale of the row), where the last dimension holds [gate, up]; returns [..., F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    y_NF = F.silu(gate_NF) * up_NF
    return y_NF if scale_N is None else y_NF * scale_N.to(y_NF.dtype).unsqueeze(-1)


def apply_rope(x_ND: Tensor, cos_NR2: Tensor, sin_NR2: Tensor) -> Tensor:
    """Rotate the last R dims by the given angles, in pairs (i, i + R/2); cos and sin broadcast."""
    half = cos_NR2.shape[-1]
    still, a, b = x_ND.split([x_ND.shape[-1] - 2 * half, half, half], dim=-1)
    return torch.cat([still, a * cos_NR2 - b * sin_NR2, b * cos_NR2 + a * sin_NR2], dim=-1)


def keys_and_values(up: Tensor, rope: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """MLA's keys and values of H heads: up [..., H, n + v] holds each head's unrotated key and its value, rope [..., R]
    the rotated part that all heads share. Returns [..., H, n + R] and [..., H, v]."""
    shared = rope.unsqueeze(-2).expand(*up.shape[:-1], -1)
    return torch.cat([up[..., :nope], shared], dim=-1), up[..., nope:]


def document_mask(document_BT: Tensor) -> Tensor:
    """True where query i may see key j: j ≤ i, and both in the same document or j in the prefix; [B, T, T]."""
    key_B1T = document_BT[:, None, :]
    return ((document_BT[:, :, None] == key_B1T) | (key_B1T == PREFIX)).tril()


def document_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTv: Tensor, document_BT: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over what `document_mask` shows; the H/K query heads of a group share keys and values.
    Returns [B, H, T, v]; softmax in fp32."""
    groups = q_BHTd.shape[1] // k_BKTd.shape[1]
    k_BHTd, v_BHTv = k_BKTd.repeat_interleave(groups, dim=1), v_BKTv.repeat_interleave(groups, dim=1)
    scores_BHTT = (q_BHTd @ k_BHTd.mT).float() * scale
    hidden_B1TT = ~document_mask(document_BT)[:, None]
    return scores_BHTT.masked_fill(hidden_B1TT, float("-inf")).softmax(-1).to(v_BHTv.dtype) @ v_BHTv


class RoutingRule(NamedTuple):
    """How logits become affinities (sigmoids, or a softmax), which experts are chosen, and with which gates.

    A group's score is the sum of its `group_top` best biased affinities: 2 in DeepSeek-V3 (section 2.1.2), 1 in
    DeepSeek-V2 (section 2.2.2). The chosen are `n_activated` experts of the `n_limited_groups` best groups.
    """

    sigmoid: bool
    renormalised: bool
    n_activated: int
    n_groups: int = 1
    n_limited_groups: int = 1
    group_top: int = 1
    scale: float = 1.0


def route(logits_NE: Tensor, bias_E: Tensor, rule: RoutingRule) -> tuple[Tensor, Tensor, Tensor]:
    """Gates [N, K] in descending order of biased affinity, the experts they belong to (int64), affinities [N, E]."""
    scores_NE = logits_NE.sigmoid() if rule.sigmoid else logits_NE.softmax(-1)
    indices_NK = choose(scores_NE.detach(), bias_E, rule)
    gates_NK = scores_NE.gather(1, indices_NK)
    if rule.renormalised:
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return gates_NK * rule.scale, indices_NK, scores_NE


def choose(scores_NE: Tensor, bias_E: Tensor, rule: RoutingRule) -> Tensor:
    """The K best of `scores + bias` inside the best groups, indices_NK. The bias steers the choice alone; gate values
    come from the scores."""
    choice_NE = scores_NE + bias_E
    if rule.n_limited_groups < rule.n_groups:
        choice_NGe = choice_NE.unflatten(-1, (rule.n_groups, -1))
        group_NG = choice_NGe.topk(rule.group_top, dim=-1).values.sum(-1)
        kept_NG = torch.zeros_like(group_NG, dtype=torch.bool)
        kept_NG.scatter_(1, group_NG.topk(rule.n_limited_groups, dim=-1).indices, True)
        choice_NE = choice_NGe.masked_fill(~kept_NG[..., None], float("-inf")).flatten(-2)
    return choice_NE.topk(rule.n_activated, dim=-1).indices


def routed_experts(
    x_ND: Tensor, gates_NK: Tensor, indices_NK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Σ_k gate_k · expert_k(x), one token and one expert at a time: what permuting and grouped products must equal."""
    rows = []
    for x_D, gates_K, indices_K in zip(x_ND, gates_NK, indices_NK, strict=True):
        outputs = [down_EDF[e] @ swiglu(gate_up_E2FD[e] @ x_D) for e in indices_K.tolist()]
        rows.append(sum(gate * output for gate, output in zip(gates_K, outputs, strict=True)))
    return torch.stack(rows)


def linear_log_probs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(x @ Wᵀ / temperature)[target] per row, fp32."""
    logits_NV = F.linear(x_ND, weight_VD.to(x_ND.dtype)).float() / temperature
    return logits_NV.log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1)
