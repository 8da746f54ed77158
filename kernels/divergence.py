"""How far a student's next-token distribution lies from a teacher's, without ever holding all the logits.

The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, 2306.13649, equation 1), p the teacher's and q
the student's distribution over one vocabulary:

    D_β = β KL(p ‖ m) + (1 − β) KL(q ‖ m),    m = β p + (1 − β) q

and, as there, D_0 = KL(p ‖ q), the forward KL of plain distillation, and D_1 = KL(q ‖ p), the reverse one. As the loss
is a sum, every row's weight is the same, and the forward pass leaves the gradients behind (`log_probs.py` has the
chunks). Letters: N rows, n rows of a chunk, D width of the student, E of the teacher, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.log_probs import Gradients, chunks

LIVE = 8  # fp32 tensors of a chunk's logits that are alive at once


def divergence(
    student_logits_nV: Tensor, teacher_logits_nV: Tensor, beta: float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(D_β of each row [n] in nats, its gradient by the student's logits [n, V]), in the dtype of the logits.

    Both distributions are taken at `temperature`. The loss is not multiplied by its square.
    """
    log_q_nV = (student_logits_nV / temperature).log_softmax(-1)
    log_p_nV = (teacher_logits_nV / temperature).log_softmax(-1)
    q_nV, p_nV = log_q_nV.exp(), log_p_nV.exp()
    if beta == 0:
        return (p_nV * (log_p_nV - log_q_nV)).sum(-1), (q_nV - p_nV) / temperature
    share, log_m_nV = 1.0, log_p_nV
    if beta < 1:
        share = 1 - beta
        log_m_nV = torch.logaddexp(log_p_nV + math.log(beta), log_q_nV + math.log(share))
    over_nV = log_q_nV - log_m_nV
    student_n1 = (q_nV * over_nV).sum(-1, keepdim=True)  # KL(q ‖ m)
    # The derivative by q of both terms is share · log q/m: what m itself depends on cancels.
    gradient_nV = share / temperature * q_nV * (over_nV - student_n1)
    loss_n = share * student_n1.squeeze(-1)
    if beta < 1:
        loss_n = loss_n + beta * (p_nV * (log_p_nV - log_m_nV)).sum(-1)
    return loss_n, gradient_nV


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_VD, teacher_x_NE, teacher_weight_VE, beta, temperature):
        gradients = Gradients(x_ND, weight_VD)
        total = torch.zeros((), device=x_ND.device)
        for part in chunks(x_ND, weight_VD, LIVE * 4):
            student_nV = F.linear(x_ND[part], weight_VD).float()
            teacher_nV = F.linear(teacher_x_NE[part], teacher_weight_VE).float()
            loss_n, gradient_nV = divergence(student_nV, teacher_nV, beta, temperature)
            total += loss_n.sum()
            gradients.add(part, gradient_nV.to(x_ND.dtype))
            del student_nV, teacher_nV, gradient_nV  # before the next chunk's are made
        ctx.save_for_backward(gradients.x_ND, gradients.of_weight())
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        # In place, for the weight's is as large as the weight: a second backward pass is refused by autograd.
        grad_x_ND, grad_weight_VD = (saved.mul_(grad) for saved in ctx.saved_tensors)
        return grad_x_ND, grad_weight_VD.to(ctx.dtype), None, None, None, None


def linear_divergence(
    x_ND: Tensor,
    weight_VD: Tensor,
    teacher_x_NE: Tensor,
    teacher_weight_VE: Tensor,
    beta: float,
    temperature: float = 1.0,
) -> Tensor:
    """Σ over rows of D_β between softmax(teacher_x @ teacher_weightᵀ) and softmax(x @ weightᵀ), fp32 scalar, in nats.

    Gradients go to the student alone, and are made at once.
    """
    assert len(weight_VD) == len(teacher_weight_VE), (weight_VD.shape, teacher_weight_VE.shape)
    return _LinearDivergence.apply(
        x_ND, weight_VD.to(x_ND.dtype), teacher_x_NE, teacher_weight_VE.to(teacher_x_NE.dtype), beta, temperature
    )
