"""Direct preference optimisation (2305.18290, equation 7) as a pure function of tensors.

Legend: B pairs of replies to the same question.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def preference_margin(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor
) -> Tensor:
    """log π/π_ref of the chosen reply less that of the rejected one, from log-probabilities of whole replies."""
    return (chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B)


def dpo_loss(margin_B: Tensor, beta: float, n_pairs: int, label_smoothing: float = 0.0) -> Tensor:
    """−Σ log σ(β margin) / n_pairs, where `n_pairs` counts the whole global batch, so that the calls add up.

    `label_smoothing` is the share of pairs believed to be labelled the wrong way round (conservative DPO).
    """
    right_B, wrong_B = logsigmoid(beta * margin_B), logsigmoid(-beta * margin_B)
    return -((1 - label_smoothing) * right_B + label_smoothing * wrong_B).sum() / n_pairs
