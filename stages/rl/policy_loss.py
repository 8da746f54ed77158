"""GRPO's objective as a pure function of tensors (DeepSeekMath, equations 3 and 4).

    J = 1/N Σ_i 1/|o_i| Σ_t min(ρ A, clip(ρ, 1−ε, 1+ε) A) − β (π_ref/π − log π_ref/π − 1),   ρ = π/π_old

Legend: B replies, T positions (right-padded).
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Log-probabilities of the sampled tokens under three policies; where `mask_BT` is 0 they count for nothing."""

    logprobs_BT: torch.Tensor  # the policy being trained; carries the gradient
    old_logprobs_BT: torch.Tensor  # the policy when it explored
    reference_logprobs_BT: torch.Tensor | None  # None: no KL term
    advantages_B: torch.Tensor
    mask_BT: torch.Tensor  # 1 on reply tokens


@dataclasses.dataclass(frozen=True)
class PolicyMetrics:
    """Sums over reply tokens (divide by `tokens`), so ranks and micro-batches add up; max_ratio is a maximum."""

    tokens: float
    kl: float
    clipped: float
    max_ratio: float


def policy_loss(
    batch: PolicyBatch, clip: float, kl_coefficient: float, n_replies: int
) -> tuple[torch.Tensor, PolicyMetrics]:
    """(−J as a scalar, metrics). `n_replies` is the N of the whole global batch, which may be split over many calls.

    The KL estimator is unbiased and never negative. Gradients of the calls add up to the gradient of one big call.
    """
    mask_BT = batch.mask_BT.to(batch.logprobs_BT.dtype)
    assert batch.logprobs_BT.shape == batch.old_logprobs_BT.shape == mask_BT.shape, (
        batch.logprobs_BT.shape,
        batch.old_logprobs_BT.shape,
        mask_BT.shape,
    )
    ratio_BT = torch.exp((batch.logprobs_BT - batch.old_logprobs_BT) * mask_BT)
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    advantages_B1 = batch.advantages_B[:, None]
    gain_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    if batch.reference_logprobs_BT is None:
        kl_BT = torch.zeros_like(gain_BT)
    else:
        log_ratio_BT = (batch.reference_logprobs_BT - batch.logprobs_BT) * mask_BT
        kl_BT = torch.exp(log_ratio_BT) - log_ratio_BT - 1
    lengths_B = mask_BT.sum(dim=1).clamp(min=1)
    per_reply_B = ((gain_BT - kl_coefficient * kl_BT) * mask_BT).sum(dim=1) / lengths_B
    with torch.no_grad():
        # Clipping acts only where it lowers the gain: the other side of the interval is free.
        acted_BT = (clipped_BT * advantages_B1 < ratio_BT * advantages_B1).to(mask_BT.dtype)
        metrics = PolicyMetrics(
            tokens=float(mask_BT.sum()),
            kl=float((kl_BT * mask_BT).sum()),
            clipped=float((acted_BT * mask_BT).sum()),
            max_ratio=float((ratio_BT * mask_BT).max()) if mask_BT.numel() else 0.0,
        )
    return -per_reply_B.sum() / n_replies, metrics
