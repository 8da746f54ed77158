"""One update for all (DeepSeekMath, section 5.2.1 and appendix A.1), and the named algorithms of the `grpo` stage.

    ∇J = E_(q, o) ~ D [ 1/|o| Σ_t GC(q, o, t) ∇ log π(o_t | q, o_<t) ]

An algorithm is a data source D, a reward and a gradient coefficient GC:

| algorithm       | data source                  | reward        | gradient coefficient                        |
|-----------------|------------------------------|---------------|---------------------------------------------|
| SFT             | q, o of the SFT set          | none          | 1                                           |
| RFT             | q of it, o ~ π_sft           | rule          | I(o): 1 if o is right, else 0               |
| online RFT      | q of it, o ~ π               | rule          | I(o)                                        |
| DPO             | q of it, o⁺ and o⁻ ~ π_sft   | rule or human | `dpo_coefficient`: + for o⁺, − for o⁻       |
| PPO             | q of it, o ~ π               | model or rule | A_t of `critic.gae`                         |
| GRPO, outcome   | q of it, G replies o_i ~ π   | model or rule | `grpo_coefficient` of `group_normalised`    |
| GRPO, process   | the same                     | of each step  | `grpo_coefficient` of `process_supervised`  |
| GRPO, progress  | the same                     | change by it  | `grpo_coefficient`, plus α `progress`       |
| GRPO, iterative | the same, π_ref renewed      | retrained     | the same                                    |

Offline sources are stages of their own: SFT is `sft`, RFT is `rejection_sample` and then `sft`. What samples from π is
the `grpo` stage, by name in `ALGORITHMS`. The coefficients hold at π = π_old, where no ratio is clipped; past that the
losses are `policy_loss`, `dpo_loss` and cross-entropy, whose gradients a test holds against this update.

Legend: B replies or pairs, T positions (right-padded), P questions, G replies to each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stages.rl.advantages import group_centred, group_normalised, leave_one_out
from stages.rl.policy_loss import PolicyObjective


def unified_loss(logprobs_BT: Tensor, coefficients_BT: Tensor, mask_BT: Tensor, normaliser: float) -> Tensor:
    """−1/Z Σ_i 1/|o_i| Σ_t GC log π, with GC a constant. `normaliser` is Z, the replies of the whole global batch."""
    mask_BT = mask_BT.to(logprobs_BT.dtype)
    gain_BT = coefficients_BT.detach() * logprobs_BT * mask_BT
    return -(gain_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)).sum() / normaliser


def dpo_coefficient(margin_B: Tensor, beta: float) -> Tensor:
    """σ(−β margin): how wrong the implicit reward still is about the pair (appendix A.1.4)."""
    return torch.sigmoid(-beta * margin_B)


def grpo_coefficient(advantages_BT: Tensor, logprobs_BT: Tensor, reference_BT: Tensor, kl_coefficient: float) -> Tensor:
    """A + β (π_ref/π − 1) (appendix A.1.6)."""
    return advantages_BT + kl_coefficient * torch.expm1(reference_BT - logprobs_BT)


def rewarded(rewards_PG: Tensor) -> Tensor:
    """The reward itself: I(o) of online RFT, for rewards of 0 and 1."""
    return rewards_PG


AlgorithmName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "online_rft", "ppo"]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    advantages: Callable[[Tensor], Tensor] | None  # rewards [P, G] → advantages [P, G]; None: a critic's
    objective: PolicyObjective


# The clips are the papers'. MiniMax does not print CISPO's; a cap of 5 is what ScaleRL (2510.13786) and TRL recommend.
ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    "grpo": Algorithm(group_normalised, PolicyObjective()),
    "dr_grpo": Algorithm(group_centred, PolicyObjective(mean="budget")),
    "dapo": Algorithm(group_normalised, PolicyObjective(clip_high=0.28, mean="token")),
    "gspo": Algorithm(group_normalised, PolicyObjective(clip_low=3e-4, clip_high=4e-4, ratio="sequence")),
    "cispo": Algorithm(
        group_normalised, PolicyObjective(clip_low=1.0, clip_high=4.0, surrogate="detached", mean="token")
    ),
    "rloo": Algorithm(leave_one_out, PolicyObjective()),
    "online_rft": Algorithm(rewarded, PolicyObjective()),
    "ppo": Algorithm(None, PolicyObjective()),
}
