"""Log-probabilities of given tokens straight from hidden states, without ever holding all the logits.

The logits of a batch are its largest tensor (V/D times the hidden states) and are used once. Here they live a chunk
at a time. `linear_log_probs` gives each row its own, and so makes the logits again in the backward pass, when the
rows' weights are known. `linear_cross_entropy` sums them, so every row's weight is the same, and the forward pass
leaves the gradients behind: three matrix products in place of four. Letters: N rows, n rows of a chunk, D width,
V vocabulary.
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
        gradients = _Gradients(x_ND, weight_VD)
        for start in range(0, x_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_nV = F.linear(x_ND[part], weight_VD).float().div_(ctx.temperature)
            # d log p(target) / d logits = onehot(target) − softmax(logits)
            grad_nV = logits_nV.sub_(logsumexp_N[part, None]).exp_().mul_(-scale_N1[part])
            grad_nV.scatter_add_(1, targets_N[part, None], scale_N1[part])
            gradients.add(part, grad_nV)
        return gradients.x_ND, gradients.weight_VD.to(weight_VD.dtype), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        chunk = _chunk_rows(weight_VD)
        minus_one_n1 = torch.full((chunk, 1), -1.0, device=x_ND.device)
        gradients = _Gradients(x_ND, weight_VD)
        total = torch.zeros((), device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_nV = F.linear(x_ND[part], weight_VD).float()
            chosen_n1 = targets_N[part, None]
            logsumexp_n1 = logits_nV.logsumexp(-1, keepdim=True)
            total += (logsumexp_n1 - logits_nV.gather(1, chosen_n1)).sum()
            grad_nV = logits_nV.sub_(logsumexp_n1).exp_()
            grad_nV.scatter_add_(1, chosen_n1, minus_one_n1[: len(chosen_n1)])
            gradients.add(part, grad_nV)
        ctx.save_for_backward(gradients.x_ND, gradients.weight_VD)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return grad_x_ND * grad, grad_weight_VD * grad, None


class _Gradients:
    """Gradients of x and of the weight (fp32), gathered chunk by chunk from those of the logits."""

    def __init__(self, x_ND: Tensor, weight_VD: Tensor) -> None:
        self._x_ND, self._weight_VD = x_ND, weight_VD
        self.x_ND = torch.empty_like(x_ND)
        self.weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)

    def add(self, part: slice, grad_nV: Tensor) -> None:
        grad_nV = grad_nV.to(self._x_ND.dtype)
        self.x_ND[part] = grad_nV @ self._weight_VD
        self.weight_VD += grad_nV.T @ self._x_ND[part]


def _chunk_rows(weight_VD: Tensor) -> int:
    return max(16, CHUNK_BYTES // (4 * weight_VD.shape[0]))


def linear_log_probs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(x @ Wᵀ / temperature)[target] per row, fp32 [N]; softmax and sums in fp32, products in x's dtype."""
    return _LinearLogProbs.apply(x_ND, weight_VD.to(x_ND.dtype), targets_N, temperature)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """−Σ over rows of log softmax(x @ Wᵀ)[target], fp32 scalar. Only for training: gradients are made at once."""
    return _LinearCrossEntropy.apply(x_ND, weight_VD.to(x_ND.dtype), targets_N)
