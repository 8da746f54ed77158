"""The objectives of PPO, GRPO and its successors as one pure function of tensors (DeepSeekMath, equations 1, 3 and 4).

    J = 1/Z Σ_i w_i Σ_t  c g(ρ, A) − β KL,      ρ = π/π_old

A `PolicyObjective` says what ρ, g, w, Z and KL are; c is an optional correction of the engine's own mismatch.
PPO and GRPO have the same g: what differs is where A comes from (`critic.py`, `advantages.py`).

Legend: B replies, T positions (right-padded).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

KlEstimator = Literal["k2", "k3", "k3_corrected"]


@dataclasses.dataclass(frozen=True)
class PolicyObjective:
    """What policy gradient to take; the defaults are GRPO's.

    ratio      token: π/π_old of each token. sequence: their geometric mean over the reply, which then is clipped as a
               whole (GSPO, 2507.18071, equation 7).
    surrogate  clipped: min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A), PPO's. detached: sg[clip(ρ)] A log π, which keeps every
               token's gradient (CISPO, 2506.13585, equation 4); `clip_low=1` bounds the weight from above only.
    mean       reply: w = 1/|o_i|, Z = replies (GRPO). token: w = 1, Z = tokens (DAPO, 2503.14476, equation 8).
               budget: w = 1, Z = replies × longest reply allowed (Dr. GRPO, 2503.20783).
    kl         k3: π_ref/π − log π_ref/π − 1, unbiased for tokens of π itself. k3_corrected: times ρ, unbiased for those
               of π_old too (DeepSeek-V3.2, 2512.02556). k2: ½ log² π_ref/π, whose gradient is unbiased.
               The plain log π/π_ref is none of them: its gradient vanishes in the mean.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clipped", "detached"] = "clipped"
    mean: Literal["reply", "token", "budget"] = "reply"
    kl_coefficient: float = 0.0
    kl: KlEstimator = "k3"

    def normaliser(self, replies: float, tokens: float, longest: int) -> float:
        """Z from the counts of the *whole* batch, which may be split over many calls and ranks."""
        return {"reply": replies, "token": tokens, "budget": replies * longest}[self.mean]


@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Log-probabilities of the sampled tokens under three policies; where `mask_BT` is 0 they count for nothing."""

    logprobs_BT: torch.Tensor  # the policy being trained; carries the gradient
    old_logprobs_BT: torch.Tensor  # the policy when it explored
    reference_logprobs_BT: torch.Tensor | None  # None: no KL term
    advantages_BT: torch.Tensor  # or [B, 1]: one for the whole reply
    mask_BT: torch.Tensor  # 1 on reply tokens
    correction_BT: torch.Tensor | None = None  # weights of the gain, as `mismatch.truncated_importance` has them


@dataclasses.dataclass(frozen=True)
class PolicyMetrics:
    """Sums over reply tokens (divide by `tokens`), so ranks and micro-batches add up; max_ratio is a maximum."""

    tokens: float
    kl: float
    clipped: float
    max_ratio: float


def policy_loss(
    batch: PolicyBatch, objective: PolicyObjective, normaliser: float
) -> tuple[torch.Tensor, PolicyMetrics]:
    """(−J as a scalar, metrics). `normaliser` is Z of the whole global batch (`objective.normaliser`).

    Gradients of the calls add up to the gradient of one big call.
    """
    mask_BT = batch.mask_BT.to(batch.logprobs_BT.dtype)
    assert batch.logprobs_BT.shape == batch.old_logprobs_BT.shape == mask_BT.shape, (
        batch.logprobs_BT.shape,
        batch.old_logprobs_BT.shape,
        mask_BT.shape,
    )
    advantages_BT, lengths_B = batch.advantages_BT, mask_BT.sum(dim=1).clamp(min=1)
    log_ratio_BT = (batch.logprobs_BT - batch.old_logprobs_BT) * mask_BT
    if objective.ratio == "sequence":
        log_ratio_BT = (log_ratio_BT.sum(dim=1) / lengths_B)[:, None].expand_as(mask_BT)
    ratio_BT = torch.exp(log_ratio_BT)
    clipped_BT = ratio_BT.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.surrogate == "detached":
        gain_BT = clipped_BT.detach() * advantages_BT * batch.logprobs_BT
        acted_BT = clipped_BT != ratio_BT
    else:
        gain_BT = torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
        # Clipping acts only where it lowers the gain: the other side of the interval is free.
        acted_BT = clipped_BT * advantages_BT < ratio_BT * advantages_BT
    if batch.correction_BT is not None:
        gain_BT = gain_BT * batch.correction_BT
    kl_BT = _kl(batch, objective.kl, ratio_BT, mask_BT)
    per_reply_B = ((gain_BT - objective.kl_coefficient * kl_BT) * mask_BT).sum(dim=1)
    if objective.mean == "reply":
        per_reply_B = per_reply_B / lengths_B
    with torch.no_grad():
        metrics = PolicyMetrics(
            tokens=float(mask_BT.sum()),
            kl=float((kl_BT * mask_BT).sum()),
            clipped=float((acted_BT * mask_BT).sum()),
            max_ratio=float((ratio_BT * mask_BT).max()) if mask_BT.numel() else 0.0,
        )
    return -per_reply_B.sum() / normaliser, metrics


def _kl(batch: PolicyBatch, estimator: KlEstimator, ratio_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Each token's estimate of KL(π ‖ π_ref), never negative; 0 without a reference."""
    if batch.reference_logprobs_BT is None:
        return torch.zeros_like(mask_BT)
    log_ratio_BT = (batch.reference_logprobs_BT - batch.logprobs_BT) * mask_BT
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    k3_BT = torch.exp(log_ratio_BT) - log_ratio_BT - 1
    return k3_BT * ratio_BT if estimator == "k3_corrected" else k3_BT
