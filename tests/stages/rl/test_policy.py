"""Advantages, the policy loss and the mismatch measure against values computed by hand in float64."""

import math

import pytest
import torch

from stages.rl.advantages import group_normalised
from stages.rl.mismatch import mismatch
from stages.rl.policy_loss import PolicyBatch, PolicyObjective, policy_loss


def test_advantages_are_normalised_within_each_group():
    rewards_PG = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0.7, 0.7, 0.7, 0.7], [0, 0, 0, 0]], dtype=torch.float64)
    advantages_PG = group_normalised(rewards_PG)
    third = 1 / math.sqrt(3)
    expected = torch.tensor(
        [[3 * third, -third, -third, -third], [1, 1, -1, -1], [0] * 4, [0] * 4], dtype=torch.float64
    )
    torch.testing.assert_close(advantages_PG, expected, rtol=0, atol=1e-12)
    assert (advantages_PG[2:] == 0).all()


def hand_loss(new, old, ref, advantages, mask, clip, beta, n):
    """The paper's formula with plain Python floats."""
    total = 0.0
    for i in range(len(new)):
        terms = []
        for t in range(len(new[i])):
            if mask[i][t]:
                ratio = math.exp(new[i][t] - old[i][t])
                clipped = min(max(ratio, 1 - clip), 1 + clip)
                kl = math.exp(ref[i][t] - new[i][t]) - (ref[i][t] - new[i][t]) - 1
                terms.append(min(ratio * advantages[i], clipped * advantages[i]) - beta * kl)
        total += sum(terms) / len(terms)
    return -total / n


NEW = [[-1.0, -0.2, -3.0], [-0.5, -0.9, -2.0]]
OLD = [[-1.5, -0.2, -1.0], [-0.1, -1.9, -9.0]]
REF = [[-1.2, -0.3, -2.0], [-0.5, -1.4, -7.0]]
ADVANTAGES = [1.3, -0.7]
MASK = [[1, 1, 1], [1, 1, 0]]
GRPO = PolicyObjective(kl_coefficient=0.04)


def batch(new=NEW, requires_grad=True):
    def table(values):
        return torch.tensor(values, dtype=torch.float64)

    logprobs_BT = table(new).requires_grad_(requires_grad)
    return PolicyBatch(logprobs_BT, table(OLD), table(REF), table(ADVANTAGES)[:, None], torch.tensor(MASK))


def test_the_loss_is_the_papers_formula_to_the_last_digits():
    loss, metrics = policy_loss(batch(), GRPO, normaliser=7)
    assert loss.item() == pytest.approx(hand_loss(NEW, OLD, REF, ADVANTAGES, MASK, 0.2, 0.04, 7), rel=1e-13)
    assert metrics.tokens == 5
    # Acting clips: e^0.5 > 1.2 with A > 0; e^-0.4 < 0.8 with A < 0. e^-2 with A > 0 and e^1 with A < 0 are free.
    assert metrics.clipped == 2
    assert metrics.max_ratio == pytest.approx(math.e)


def test_the_gradient_is_the_finite_difference_of_the_formula_and_zero_where_clipped_or_masked():
    given = batch()
    policy_loss(given, GRPO, 2)[0].backward()
    grad_BT = given.logprobs_BT.grad
    for i in range(2):
        for t in range(3):
            shifted = []
            for sign in (1, -1):
                new = [list(row) for row in NEW]
                new[i][t] += sign * 1e-6
                shifted.append(hand_loss(new, OLD, REF, ADVANTAGES, MASK, 0.2, 0.04, 2))
            assert grad_BT[i, t].item() == pytest.approx((shifted[0] - shifted[1]) / 2e-6, abs=1e-8)
    assert grad_BT[1, 2] == 0


def test_at_the_exploring_policy_the_gradient_is_plain_policy_gradient():
    logprobs_BT = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    given = PolicyBatch(
        logprobs_BT, logprobs_BT.detach(), None, torch.tensor(ADVANTAGES).double()[:, None], torch.tensor(MASK)
    )
    loss, metrics = policy_loss(given, PolicyObjective(), 2)
    loss.backward()
    expected = -torch.tensor([[1.3 / 3] * 3, [-0.7 / 2, -0.7 / 2, 0]], dtype=torch.float64) / 2
    torch.testing.assert_close(logprobs_BT.grad, expected)
    assert (metrics.clipped, metrics.max_ratio, metrics.kl) == (0, 1, 0)


def test_the_gradients_of_micro_batches_add_up_to_that_of_the_batch():
    whole = batch()
    policy_loss(whole, GRPO, 2)[0].backward()
    parts = []
    for i in range(2):
        full = batch()
        rows = [getattr(full, name)[i : i + 1] for name in ("old_logprobs_BT", "reference_logprobs_BT")]
        leaf = full.logprobs_BT.detach()[i : i + 1].requires_grad_()
        part = PolicyBatch(leaf, *rows, full.advantages_BT[i : i + 1], full.mask_BT[i : i + 1])
        policy_loss(part, GRPO, 2)[0].backward()
        parts.append(leaf.grad)
    torch.testing.assert_close(torch.cat(parts), whole.logprobs_BT.grad, rtol=0, atol=1e-15)


def test_the_kl_estimator_is_unbiased_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    zero = torch.zeros(len(drawn), 1, dtype=torch.float64)
    given = PolicyBatch(
        policy[drawn][:, None], policy[drawn][:, None], reference[drawn][:, None], zero, torch.ones_like(zero)
    )
    _, metrics = policy_loss(given, PolicyObjective(kl_coefficient=1.0), len(drawn))
    exact = float((policy.exp() * (policy - reference)).sum())
    assert metrics.kl / metrics.tokens == pytest.approx(exact, rel=0.03)
    each = torch.exp(reference - policy) - (reference - policy) - 1
    assert (each >= 0).all()


def test_mismatch_is_zero_for_equal_engines_and_the_true_divergence_for_others():
    generator = torch.Generator().manual_seed(1)
    engine, learner = (torch.randn(30, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True, generator=generator)
    same = mismatch(engine[drawn], engine[drawn])
    assert (same.kl_sum, same.max_ratio) == (0, 1)
    other = mismatch(learner[drawn], engine[drawn])
    exact = float((engine.exp() * (engine - learner)).sum())
    assert other.kl_sum / other.tokens == pytest.approx(exact, rel=0.03)
    assert other.max_ratio == pytest.approx(float((engine - learner).abs().exp().max()))
