"""Advantages from groups of replies to the same question (GRPO; DeepSeekMath, section 4.1).

Where all rewards of a group are equal it says nothing about which reply was better: its advantages are exactly 0.

Legend: P questions, G replies to each, T positions.
"""

from __future__ import annotations

import torch

TOLERANCE = 1e-6


def without_contrast(rewards_PG: torch.Tensor) -> torch.Tensor:
    """[P] bool: which groups have rewards that are all equal."""
    return rewards_PG.std(dim=1, correction=0) <= TOLERANCE


def group_normalised(rewards_PG: torch.Tensor) -> torch.Tensor:
    """A = (r − mean r) / std r within each group, population std, in the rewards' dtype (DeepSeekMath, 4.1.2)."""
    mean_P1 = rewards_PG.mean(dim=1, keepdim=True)
    std_P1 = rewards_PG.std(dim=1, keepdim=True, correction=0)
    flat_P1 = std_P1 <= TOLERANCE
    return torch.where(flat_P1, 0.0, (rewards_PG - mean_P1) / torch.where(flat_P1, 1.0, std_P1))


def group_centred(rewards_PG: torch.Tensor) -> torch.Tensor:
    """A = r − mean r: questions that are nearly always or nearly never solved weigh no more (Dr. GRPO, 2503.20783)."""
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return torch.where(without_contrast(rewards_PG)[:, None], 0.0, centred_PG)


def leave_one_out(rewards_PG: torch.Tensor) -> torch.Tensor:
    """A = r − the mean of the *other* replies' rewards, an unbiased baseline (RLOO, 2402.14740)."""
    size = rewards_PG.shape[1]
    return group_centred(rewards_PG) * (size / (size - 1))


def process_supervised(rewards_PGT: torch.Tensor, ends_PGT: torch.Tensor) -> torch.Tensor:
    """A of a token = Σ of the normalised rewards of the steps that end there or later (DeepSeekMath, 4.1.3).

    A step's reward stands where the step ends, and `ends_PGT` is 1 there. All step rewards of a group are normalised
    together: by their mean and population std, whichever reply they belong to. [P, G, T]; 0 behind the last step.
    """
    ends_PGT = ends_PGT.to(rewards_PGT.dtype)
    steps_P11 = ends_PGT.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    mean_P11 = (rewards_PGT * ends_PGT).sum(dim=(1, 2), keepdim=True) / steps_P11
    centred_PGT = (rewards_PGT - mean_P11) * ends_PGT
    std_P11 = (centred_PGT.square().sum(dim=(1, 2), keepdim=True) / steps_P11).sqrt()
    normalised_PGT = torch.where(std_P11 <= TOLERANCE, 0.0, centred_PGT / std_P11.clamp(min=TOLERANCE))
    return normalised_PGT.flip(-1).cumsum(-1).flip(-1)


def progress(values_PGT: torch.Tensor, ends_PGT: torch.Tensor) -> torch.Tensor:
    """What each step changes of the value (Setlur et al. 2024, Rewarding Progress, 2410.08146, section 3).

    A value is how likely a right answer is after a step, and stands where the step ends, where `ends_PGT` is 1. Before
    the first step it is the mean over the group of what it is after a first step. [P, G, T]; 0 where no step ends.
    """
    ends_PGT = ends_PGT.bool()
    places_T = torch.arange(values_PGT.shape[-1])
    number_PGT = ends_PGT.cumsum(-1)  # of steps that have ended
    replies_P1 = ends_PGT.any(-1).sum(-1, keepdim=True).clamp(min=1)
    start_P1 = (values_PGT * (ends_PGT & (number_PGT == 1))).sum(dim=(1, 2))[:, None] / replies_P1
    last_PGT = torch.where(ends_PGT, places_T, -1).cummax(-1).values.roll(1, -1)  # where the step before ends
    last_PGT[..., 0] = -1
    before_PGT = values_PGT.gather(-1, last_PGT.clamp(min=0))
    before_PGT = torch.where(last_PGT < 0, start_P1[..., None], before_PGT)
    return torch.where(ends_PGT, values_PGT - before_PGT, 0.0)


def own_step(rewards_PGT: torch.Tensor, ends_PGT: torch.Tensor) -> torch.Tensor:
    """To each token the reward of the step that it is in, which stands where the step ends.

    Progress is not normalised: a group in which the model sees hardly any would be its noise, made as large as any
    other's verdict. [P, G, T]; 0 behind the last step.
    """
    length = rewards_PGT.shape[-1]
    ending_PGT = torch.where(ends_PGT.bool(), torch.arange(length), length)
    own_PGT = ending_PGT.flip(-1).cummin(-1).values.flip(-1)  # where the step that a token is in ends
    return torch.where(own_PGT < length, rewards_PGT.gather(-1, own_PGT.clamp(max=length - 1)), 0.0)
