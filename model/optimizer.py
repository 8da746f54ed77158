"""AdamW as the papers run it: β = (0.9, 0.95), weight decay 0.1, on matrices only."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (1711.05101) with decoupled decay on every weight of two or more dimensions, embedding and head included.

    Norm gains and biases are not decayed: the papers give one decay for the whole model, and this is the split the
    field reads into it. Group 0 is decayed, group 1 is not. Fused on CPU and CUDA alike.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
