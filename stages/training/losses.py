"""Training losses: next-token cross-entropy under a mask, multi-token prediction, balance.

Legend: B sequences, T positions, D width, V vocabulary, k depth (0 next-token, 1… the MTP modules).

Cross-entropy comes as a *sum*, its count kept apart. The trainer divides by the counts of the whole optimiser step,
over all micro-batches and ranks, so that neither accumulation nor world size changes what is minimised.
"""

import torch
from torch import Tensor

import kernels


def target_mask(loss_mask_BT: Tensor | None, document_BT: Tensor | None, depth: int = 0) -> Tensor | None:
    """Which positions learn their target k + 1 tokens ahead: bool [B, T − k] for inputs of T tokens; None means all.

    Both arguments are [B, T + 1], as Batch has them. loss_mask_BT marks *tokens to be learnt*, wherever they are
    predicted from, so it shifts exactly as the targets do. A target in another document than its position is left
    out: packing must not teach one conversation to predict the next.
    """
    ahead = depth + 1
    mask_BT = None if loss_mask_BT is None else loss_mask_BT[:, ahead:].bool()
    if document_BT is not None:
        same_BT = document_BT[:, ahead:] == document_BT[:, :-ahead]
        mask_BT = same_BT if mask_BT is None else mask_BT & same_BT
    return mask_BT


def cross_entropy_sum(hidden_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Σ −log p(target) in nats over unmasked positions, fp32 scalar.

    Only the unmasked states reach the head, in chunks: a fine-tuning step pays for the tokens it learns. A CUDA graph
    knows no shapes but those it was recorded with: there all states do.
    """
    assert hidden_BTD.shape[:2] == targets_BT.shape, (hidden_BTD.shape, targets_BT.shape)
    if mask_BT is None:
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    elif hidden_BTD.is_cuda and torch.cuda.is_current_stream_capturing():
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.masked_fill(~mask_BT, kernels.NO_TARGET).flatten()
    else:
        hidden_ND, targets_N = hidden_BTD[mask_BT], targets_BT[mask_BT]
    return kernels.linear_cross_entropy(hidden_ND, head_VD, targets_N)


def total_loss(main: Tensor, mtp: list[Tensor], balance: Tensor, mtp_lambda: Tensor | float) -> Tensor:
    """L = L_main + λ/D·Σ_k L_MTP^k + L_balance over D depths (V3, equation 25), shares of means; α is in L_balance."""
    loss = main + balance
    if mtp:
        loss = loss + mtp_lambda / len(mtp) * torch.stack(mtp).sum()
    return loss
