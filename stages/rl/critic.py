"""What PPO adds to the policy loss when a critic gives the baseline (1707.06347; DeepSeekMath, section 4.1.1).

Legend: B replies, T positions (right-padded).
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(
    rewards_B: Tensor, logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, kl_coefficient: float
) -> Tensor:
    """r_t = −β log(π/π_ref), and on a reply's last token its reward besides (DeepSeekMath, equation 2)."""
    mask_BT = mask_BT.to(logprobs_BT.dtype)
    last_BT = mask_BT * (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    return last_BT * rewards_B[:, None] - kl_coefficient * (logprobs_BT - reference_BT) * mask_BT


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lambda_: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T] and 0 behind a reply's end (GAE, 1506.02438, equation 16).

    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   return = A + V.  A reply's end is terminal: V is 0 there.
    """
    mask_BT = mask_BT.to(values_BT.dtype)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = next_advantage_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + gamma * lambda_ * next_advantage_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t] * mask_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, advantages_BT + values_BT * mask_BT


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float, normaliser: float
) -> Tensor:
    """½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²) / Z: the critic may not run from its old self in one batch.

    `normaliser` is Z, the tokens of the whole global batch, so that the calls add up.
    """
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    error_BT = torch.maximum((values_BT - returns_BT).square(), (near_BT - returns_BT).square())
    return (error_BT * mask_BT).sum() / (2 * normaliser)
