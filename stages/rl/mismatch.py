"""How far the engine that explored lies from the model that learns: same weights, other arithmetic.

Legend: N sampled tokens.
"""

from __future__ import annotations

import dataclasses

import torch

from infra.errors import FathomError


class EngineMismatch(FathomError):
    """The engine that explored and the learner no longer mean the same policy."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class Mismatch:
    kl_sum: float  # Σ over tokens of the estimate of KL(engine ‖ learner); divide by `tokens`
    max_ratio: float  # the largest of π_learner/π_engine and its inverse
    tokens: int


def truncated_importance(learner_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(π_learner/π_engine, cap): what the gain of a token is weighed with so that the engine's samples count as the
    learner's own would, but for the few that would count too much (truncated importance sampling; no gradient)."""
    return torch.exp(learner_logprobs.detach() - engine_logprobs).clamp(max=cap)


def mismatch(learner_logprobs_N: torch.Tensor, engine_logprobs_N: torch.Tensor) -> Mismatch:
    """Compare log-probabilities of the same sampled tokens. The estimate r − 1 − log r of the tokens that the *engine*
    sampled is unbiased for KL(engine ‖ learner), r = π_learner/π_engine. 0 and 1 when both compute the same."""
    log_ratio_N = learner_logprobs_N.double() - engine_logprobs_N.double()
    if log_ratio_N.numel() == 0:
        return Mismatch(0.0, 1.0, 0)
    kl_N = torch.expm1(log_ratio_N) - log_ratio_N
    return Mismatch(float(kl_N.sum()), float(log_ratio_N.abs().max().exp()), log_ratio_N.numel())


def check_mismatch(step: int, kl_sum: float, tokens: float, limit: float | None) -> None:
    """Raise EngineMismatch where the mean over the step's tokens is past `limit` nats; None: never."""
    kl = kl_sum / max(tokens, 1.0)
    if limit is not None and not kl <= limit:
        raise EngineMismatch(
            f"step {step}: KL(engine ‖ learner) is {kl:.3g} nats a token, past max_mismatch_kl={limit}: its replies "
            "are no longer the learner's own, and nothing was learnt from them. Have the engine compute in the "
            "learner's precision, lower learning_rate or set staleness to 0; importance_cap corrects what is left, and "
            "a higher max_mismatch_kl accepts it"
        )
