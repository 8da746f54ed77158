"""Log-probabilities of given tokens straight from hidden states, without ever holding all the logits.

The logits of a batch are its largest tensor (V/D times the hidden states) and are used once. Here they live a chunk
at a time. `linear_log_probs` gives each row its own, and so makes the logits again in the backward pass, when the
rows' weights are known. `linear_cross_entropy` sums them, so every row's weight is the same, and the forward pass
leaves the gradients behind: three matrix products in place of four. Letters: N rows, n rows of a chunk, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import implementation

# Logits of one chunk. On a CPU core they stay in cache; on a GPU the chunks must be few, for each of them reads and
# writes the whole fp32 gradient of the head.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1600 << 20}


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        logsumexp_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
        chosen_N = torch.empty_like(logsumexp_N)
        for part in chunks(x_ND, weight_VD, 4):
            logits_nV = F.linear(x_ND[part], weight_VD).float().div_(temperature)
            logsumexp_N[part] = logits_nV.logsumexp(-1)
            chosen_N[part] = logits_nV.gather(1, targets_N[part, None]).squeeze(1)
            del logits_nV  # before the next chunk's are made
        ctx.save_for_backward(x_ND, weight_VD, targets_N, logsumexp_N)
        ctx.temperature = temperature
        return chosen_N - logsumexp_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        x_ND, weight_VD, targets_N, logsumexp_N = ctx.saved_tensors
        scale_N1 = (grad_N.float() / ctx.temperature).unsqueeze(1)
        gradients = Gradients(x_ND, weight_VD)
        for part in chunks(x_ND, weight_VD, 4):
            logits_nV = F.linear(x_ND[part], weight_VD).float().div_(ctx.temperature)
            # d log p(target) / d logits = onehot(target) − softmax(logits)
            grad_nV = logits_nV.sub_(logsumexp_N[part, None]).exp_().mul_(-scale_N1[part])
            grad_nV.scatter_add_(1, targets_N[part, None], scale_N1[part])
            gradients.add(part, grad_nV.to(x_ND.dtype))
            del logits_nV, grad_nV
        return gradients.x_ND, gradients.of_weight().to(weight_VD.dtype), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        gradients = Gradients(x_ND, weight_VD) if any(ctx.needs_input_grad) else None
        total = torch.zeros((), device=x_ND.device)
        for part in chunks(x_ND, weight_VD, x_ND.dtype.itemsize):
            logits_nV = F.linear(x_ND[part], weight_VD)
            loss_n, grad_nV = implementation(x_ND).cross_entropy_gradient(logits_nV, targets_N[part])
            total += loss_n.sum()
            if gradients is not None:
                gradients.add(part, grad_nV)
            del logits_nV, grad_nV  # before the next chunk's are made
        if gradients is not None:
            ctx.save_for_backward(gradients.x_ND, gradients.of_weight())
            ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        # In place, for the weight's is as large as the weight: a second backward pass is refused by autograd.
        grad_x_ND, grad_weight_VD = (saved.mul_(grad) for saved in ctx.saved_tensors)
        return grad_x_ND, grad_weight_VD.to(ctx.dtype), None


class Gradients:
    """Gradients of x and of the weight (in fp32 where chunks are several), gathered chunk by chunk from the logits'."""

    def __init__(self, x_ND: Tensor, weight_VD: Tensor) -> None:
        self._x_ND, self._weight_VD = x_ND, weight_VD
        self.x_ND = torch.empty_like(x_ND)
        self._sum_VD: Tensor | None = None

    def add(self, part: slice, grad_nV: Tensor) -> None:
        torch.mm(grad_nV, self._weight_VD, out=self.x_ND[part])
        x_nD = self._x_ND[part]
        if len(x_nD) == len(self._x_ND):
            self._sum_VD = grad_nV.T @ x_nD
            return
        if self._sum_VD is None:
            self._sum_VD = torch.zeros_like(self._weight_VD, dtype=torch.float32)
        if x_nD.dtype != torch.float32 and x_nD.is_cuda and not torch.compiler.is_compiling():  # it can't trace this
            torch.addmm(self._sum_VD, grad_nV.T, x_nD, out_dtype=torch.float32, out=self._sum_VD)
        else:
            self._sum_VD += grad_nV.T @ x_nD

    def of_weight(self) -> Tensor:
        return torch.zeros_like(self._weight_VD) if self._sum_VD is None else self._sum_VD


def chunks(x_ND: Tensor, weight_VD: Tensor, bytes_per_logit: int) -> Iterator[slice]:
    """Even slices of the rows whose logits keep to CHUNK_BYTES."""
    n_rows, n_bytes = len(x_ND), CHUNK_BYTES[x_ND.device.type]
    most = max(16, n_bytes // (bytes_per_logit * weight_VD.shape[0]))
    count = -(-n_rows // most)
    size = -(-n_rows // max(count, 1))
    return (slice(start, start + size) for start in range(0, n_rows, max(size, 1)))


def linear_log_probs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(x @ Wᵀ / temperature)[target] per row, fp32 [N]; softmax and sums in fp32, products in x's dtype."""
    return _LinearLogProbs.apply(x_ND, weight_VD.to(x_ND.dtype), targets_N, temperature)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """−Σ over rows of log softmax(x @ Wᵀ)[target], fp32 scalar; a row whose target is NO_TARGET counts nothing.
    Gradients, where they are wanted, are made at once."""
    return _LinearCrossEntropy.apply(x_ND, weight_VD.to(x_ND.dtype), targets_N)
