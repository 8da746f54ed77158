"""Log-probabilities of given tokens straight from hidden states, without ever holding all the logits.

The logits of a batch are its largest tensor (V/D times the hidden states) and are used once. Here they are made
a chunk at a time, reduced, and made again in the backward pass: one more matrix product in exchange for memory
traffic that would cost more than the products themselves. Letters: N rows, n rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 4 << 20  # fp32 logits of one chunk: small enough to stay in cache on a CPU core


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        chunk = _chunk_rows(weight_VD)
        logsumexp_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
        chosen_N = torch.empty_like(logsumexp_N)
        for start in range(0, x_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_nV = F.linear(x_ND[part], weight_VD).float().div_(temperature)
            logsumexp_N[part] = logits_nV.logsumexp(-1)
            chosen_N[part] = logits_nV.gather(1, targets_N[part, None]).squeeze(1)
        ctx.save_for_backward(x_ND, weight_VD, targets_N, logsumexp_N)
        ctx.temperature = temperature
        return chosen_N - logsumexp_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        x_ND, weight_VD, targets_N, logsumexp_N = ctx.saved_tensors
        chunk = _chunk_rows(weight_VD)
        scale_N1 = (grad_N.float() / ctx.temperature).unsqueeze(1)
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, x_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_nV = F.linear(x_ND[part], weight_VD).float().div_(ctx.temperature)
            # d log p(target) / d logits = onehot(target) − softmax(logits)
            grad_nV = logits_nV.sub_(logsumexp_N[part, None]).exp_().mul_(-scale_N1[part])
            grad_nV.scatter_add_(1, targets_N[part, None], scale_N1[part])
            grad_nV = grad_nV.to(x_ND.dtype)
            grad_x_ND[part] = grad_nV @ weight_VD
            grad_weight_VD += grad_nV.T @ x_ND[part]
        return grad_x_ND, grad_weight_VD.to(weight_VD.dtype), None, None


def _chunk_rows(weight_VD: Tensor) -> int:
    return max(16, CHUNK_BYTES // (4 * weight_VD.shape[0]))


def linear_log_probs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(x @ Wᵀ / temperature)[target] per row, fp32 [N]; softmax and sums in fp32, products in x's dtype."""
    return _LinearLogProbs.apply(x_ND, weight_VD.to(x_ND.dtype), targets_N, temperature)
