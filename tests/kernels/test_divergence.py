"""Divergences of distillation against hand-computed values, TRL's losses, autograd, and whole softmaxes."""

import math

import pytest
import torch

import kernels
from kernels import log_probs

BETAS = (0.0, 0.3, 1.0)


def logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def test_divergences_of_two_coins_are_those_made_by_hand():
    p, q = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    # β = ½: m = (3/8, 5/8)
    middle = 0.25 * (math.log(4 / 3) + math.log(4 / 5)) + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.5, middle)):
        (found,), _ = kernels.divergence(q.log(), p.log(), beta)
        assert found.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_trls_and_their_gradients_autograds(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student_NV, teacher_NV = logits(6, 11).requires_grad_(), logits(6, 11, seed=1)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student_NV[None], teacher_NV[None], None, beta, temperature, "sum")
    loss_N, ours_NV = kernels.divergence(student_NV.detach(), teacher_NV, beta, temperature)
    torch.testing.assert_close(loss_N.sum(), theirs.detach(), rtol=1e-12, atol=1e-14)
    (theirs_NV,) = torch.autograd.grad(theirs, student_NV)
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=1e-10, atol=1e-14)
    assert theirs_NV.abs().max() > 0.01


@pytest.mark.parametrize("beta", BETAS)
def test_a_divergence_over_chunks_is_that_of_whole_softmaxes(beta, monkeypatch):
    monkeypatch.setitem(log_probs.CHUNK_BYTES, "cpu", 32 * 50 * 16)
    x_ND, weight_VD = logits(70, 8, dtype=torch.float32), logits(50, 8, seed=1, dtype=torch.float32)
    teacher_x_NE, teacher_VE = logits(70, 12, seed=2, dtype=torch.float32), logits(50, 12, seed=3, dtype=torch.float32)
    own = [x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()]
    loss = kernels.linear_divergence(*own, teacher_x_NE, teacher_VE, beta, 2.0)
    (3 * loss).backward()
    whole = [x_ND.double().requires_grad_(), weight_VD.double().requires_grad_()]
    logits_NV = whole[0] @ whole[1].T
    loss_N, gradient_NV = kernels.divergence(logits_NV, teacher_x_NE.double() @ teacher_VE.double().T, beta, 2.0)
    torch.testing.assert_close(loss.double(), loss_N.sum(), rtol=1e-5, atol=1e-6)
    logits_NV.backward(3 * gradient_NV.detach())
    for ours, theirs in zip(own, whole, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    x_NV = logits(5, 9)
    for beta in BETAS:
        loss_N, gradient_NV = kernels.divergence(x_NV, x_NV, beta)
        assert loss_N.abs().max() < 1e-14
        assert gradient_NV.abs().max() < 1e-14
