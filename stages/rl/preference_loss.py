"""Losses of preferences and of labelled steps, as pure functions of tensors: DPO (2305.18290, equation 7), its
likelihood term, Bradley–Terry, and the cross-entropy of a process reward model.

Each is a sum over a count of the *whole* global batch, so that the calls of its parts add up.

Legend: B pairs of replies to the same question, N steps.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def preference_margin(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor
) -> Tensor:
    """log π/π_ref of the chosen reply less that of the rejected one, from log-probabilities of whole replies."""
    return (chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B)


def dpo_loss(margin_B: Tensor, beta: float, n_pairs: int, label_smoothing: float = 0.0) -> Tensor:
    """−Σ log σ(β margin) / n_pairs.

    `label_smoothing` is the share of pairs believed to be labelled the wrong way round (conservative DPO).
    """
    right_B, wrong_B = logsigmoid(beta * margin_B), logsigmoid(-beta * margin_B)
    return -((1 - label_smoothing) * right_B + label_smoothing * wrong_B).sum() / n_pairs


def likelihood_loss(chosen_B: Tensor, lengths_B: Tensor, n_pairs: int) -> Tensor:
    """−Σ log π(chosen) / |chosen| / n_pairs: what keeps DPO from making both replies unlikely (iterative reasoning
    preference optimisation, 2404.19733, section 2)."""
    return -(chosen_B / lengths_B).sum() / n_pairs


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, n_pairs: int) -> Tensor:
    """−Σ log σ(r_chosen − r_rejected) / n_pairs (2203.02155, equation 1). DPO's is the same, of implicit rewards."""
    return dpo_loss(chosen_B - rejected_B, 1.0, n_pairs)


def step_loss(values_N: Tensor, labels_N: Tensor, n_chains: int) -> Tensor:
    """Σ over steps of the cross-entropy of σ(value) and the label in [0, 1], / n_chains (Math-Shepherd, 2312.08935,
    section 3)."""
    return binary_cross_entropy_with_logits(values_N, labels_N, reduction="sum") / n_chains
