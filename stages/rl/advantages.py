"""Advantages from groups of replies to the same question (GRPO; DeepSeekMath, section 4.1).

Legend: P questions, G replies to each.
"""

from __future__ import annotations

import torch


def group_normalised(rewards_PG: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    """A = (r − mean r) / std r within each group, population std, in the rewards' dtype.

    A group whose rewards are all equal says nothing about which reply was better: its advantages are exactly 0.
    """
    mean_P1 = rewards_PG.mean(dim=1, keepdim=True)
    std_P1 = rewards_PG.std(dim=1, keepdim=True, correction=0)
    flat_P1 = std_P1 <= tolerance
    return torch.where(flat_P1, 0.0, (rewards_PG - mean_P1) / torch.where(flat_P1, 1.0, std_P1))
