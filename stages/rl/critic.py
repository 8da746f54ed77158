"""What PPO adds to the policy loss when a critic gives the baseline (1707.06347; DeepSeekMath, section 4.1.1).

Legend: B replies, T positions (right-padded).
"""

from __future__ import annotations

import torch
from torch import Tensor

from infra.config import Config, Field


class CriticConfig(Config):
    """PPO's critic: a copy of the policy's trunk with a scalar head, trained in the same loop."""

    learning_rate: float = Field(
        1e-3, ge=0, title="Learning rate", description="Larger than the policy's: it lags else"
    )
    gamma: float = Field(1.0, ge=0, le=1, title="Discount γ")
    gae_lambda: float = Field(0.95, ge=0, le=1, title="GAE λ")
    clip: float = Field(0.2, gt=0, title="Value clip", description="How far a value may run in one exploration")


def token_rewards(
    rewards_BT: Tensor, logprobs_BT: Tensor, reference_BT: Tensor | None, mask_BT: Tensor, kl_coefficient: float
) -> Tensor:
    """r_t − β log(π/π_ref): what a token earns, such as a reply's reward on its last, less what it costs to leave the
    reference (DeepSeekMath, equation 2). Without a reference, what it earns."""
    paid_BT = rewards_BT * mask_BT
    return paid_BT if reference_BT is None else paid_BT - kl_coefficient * (logprobs_BT - reference_BT) * mask_BT


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
