"""Every named loss against plain Python floats, split over calls, and against DeepSeekMath's one update.

Legend: B replies, T positions, P questions, G replies to each.
"""

import dataclasses
import math

import pytest
import torch

from stages.rl.advantages import (
    group_centred,
    group_normalised,
    leave_one_out,
    own_step,
    process_supervised,
    progress,
    without_contrast,
)
from stages.rl.algorithms import ALGORITHMS, dpo_coefficient, grpo_coefficient, rewarded, unified_loss
from stages.rl.critic import gae, token_rewards, value_loss
from stages.rl.mismatch import truncated_importance
from stages.rl.policy_loss import PolicyBatch, PolicyObjective, policy_loss
from stages.rl.preference_loss import dpo_loss, preference_margin

NEW = [[-1.0, -0.2, -3.0, -0.4], [-0.5, -0.9, -2.0, 0.0], [-2.0, -0.1, 0.0, 0.0]]
OLD = [[-1.5, -0.2, -1.0, -0.45], [-0.1, -1.9, -9.0, 0.0], [-2.1, -0.3, 0.0, 0.0]]
REF = [[-1.2, -0.3, -2.0, -0.5], [-0.5, -1.4, -7.0, 0.0], [-1.0, -0.4, 0.0, 0.0]]
CORRECTION = [[1.0, 0.5, 2.0, 1.1], [0.9, 1.3, 5.0, 0.0], [0.7, 1.0, 0.0, 0.0]]
ADVANTAGES = [1.3, -0.7, 0.4]
LENGTHS = [4, 2, 2]
BUDGET = 6
OBJECTIVES = {
    **{name: algorithm.objective for name, algorithm in ALGORITHMS.items()},
    "gspo, wide": PolicyObjective(clip_low=0.2, clip_high=0.05, ratio="sequence"),
    "cispo, tight": PolicyObjective(clip_low=0.3, clip_high=0.1, surrogate="detached", mean="token"),
    "k2": PolicyObjective(kl="k2"),
    "k3_corrected": PolicyObjective(kl="k3_corrected", mean="token"),
}


def table(values):
    return torch.tensor(values, dtype=torch.float64)


MASK_BT = torch.arange(4)[None] < torch.tensor(LENGTHS)[:, None]


def batch(new=NEW, rows=slice(None)):
    return PolicyBatch(
        table(new)[rows].requires_grad_(),
        table(OLD)[rows],
        table(REF)[rows],
        table(ADVANTAGES)[rows, None],
        MASK_BT[rows],
        table(CORRECTION)[rows],
    )


def hand_loss(objective, new=NEW, frozen=NEW):
    """The papers' formulas with plain floats; `frozen` is what a stopped gradient does not move."""
    low, high, total = 1 - objective.clip_low, 1 + objective.clip_high, 0.0
    for i, length in enumerate(LENGTHS):

        def ratio(at, t, i=i, length=length):
            if objective.ratio == "token":
                return math.exp(at[i][t] - OLD[i][t])
            return math.exp(sum(at[i][s] - OLD[i][s] for s in range(length)) / length)

        terms = []
        for t in range(length):
            rho = ratio(new, t)
            if objective.surrogate == "detached":
                gain = min(max(ratio(frozen, t), low), high) * ADVANTAGES[i] * new[i][t]
            else:
                gain = min(rho * ADVANTAGES[i], min(max(rho, low), high) * ADVANTAGES[i])
            away = REF[i][t] - new[i][t]
            k3 = math.exp(away) - away - 1
            kl = {"k2": away**2 / 2, "k3": k3, "k3_corrected": k3 * rho}[objective.kl]
            terms.append(CORRECTION[i][t] * gain - objective.kl_coefficient * kl)
        total += sum(terms) / (length if objective.mean == "reply" else 1)
    return -total / {"reply": 3, "token": 8, "budget": 18}[objective.mean]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_and_its_gradient_are_the_papers_formula_to_the_last_digits(name):
    objective = dataclasses.replace(OBJECTIVES[name], kl_coefficient=0.04)
    given = batch()
    loss, _ = policy_loss(given, objective, objective.normaliser(3, 8, BUDGET))
    assert loss.item() == pytest.approx(hand_loss(objective), rel=1e-13)
    loss.backward()
    for i, length in enumerate(LENGTHS):
        for t in range(4):
            shifted = []
            for sign in (1, -1):
                new = [list(row) for row in NEW]
                new[i][t] += sign * 1e-6
                shifted.append(hand_loss(objective, new))
            expected = (shifted[0] - shifted[1]) / 2e-6 if t < length else 0.0
            assert given.logprobs_BT.grad[i, t].item() == pytest.approx(expected, abs=2e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_calls_of_micro_batches_and_ranks_add_up_to_one_call(name):
    objective = dataclasses.replace(OBJECTIVES[name], kl_coefficient=0.04)
    normaliser = objective.normaliser(3, 8, BUDGET)
    whole, parts = batch(), [batch(rows=slice(0, 1)), batch(rows=slice(1, 3))]
    loss, metrics = policy_loss(whole, objective, normaliser)
    loss.backward()
    losses, counts = zip(*(policy_loss(part, objective, normaliser) for part in parts), strict=True)
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.cat([part.logprobs_BT.grad for part in parts]), whole.logprobs_BT.grad, rtol=1e-13, atol=1e-16
    )
    for measure in ("tokens", "kl", "clipped"):
        assert sum(getattr(count, measure) for count in counts) == pytest.approx(getattr(metrics, measure), rel=1e-13)


def test_presets_are_the_papers():
    assert ALGORITHMS["grpo"].objective == PolicyObjective(0.2, 0.2, "token", "clipped", "reply", 0.0, "k3")
    assert (ALGORITHMS["dapo"].objective.clip_low, ALGORITHMS["dapo"].objective.clip_high) == (0.2, 0.28)
    assert (ALGORITHMS["gspo"].objective.clip_low, ALGORITHMS["gspo"].objective.clip_high) == (3e-4, 4e-4)


def test_clipping_a_reply_as_a_whole_takes_its_gradient_and_cispo_takes_none():
    far = dataclasses.replace(batch(), old_logprobs_BT=table(NEW) - 0.3, advantages_BT=table([[1.0]] * 3))
    for name, learns in (("gspo", False), ("grpo", False), ("cispo, tight", True)):
        far.logprobs_BT.grad = None
        loss, metrics = policy_loss(far, OBJECTIVES[name], 1)
        loss.backward()
        assert metrics.clipped == metrics.tokens == 8
        assert bool((far.logprobs_BT.grad != 0).any()) == learns


def test_centred_and_leave_one_out_advantages():
    rewards_PG = table([[1, 0, 0, 0], [1, 1, 0, 0], [0.7] * 4])
    torch.testing.assert_close(
        group_centred(rewards_PG), table([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0.0] * 4])
    )
    out_PG = leave_one_out(rewards_PG)
    for p in range(3):
        for g in range(4):
            others = [float(rewards_PG[p, other]) for other in range(4) if other != g]
            assert out_PG[p, g].item() == pytest.approx(float(rewards_PG[p, g]) - sum(others) / 3, abs=1e-15)
    assert without_contrast(rewards_PG).tolist() == [False, False, True]
    assert (group_centred(rewards_PG)[2] == 0).all()


def test_process_supervision_sums_the_normalised_rewards_of_the_steps_from_there_on():
    # Reply 1 has steps ending at 1 and 3 with rewards 1 and 0; reply 2 one step ending at 2 with reward 2.
    rewards_PGT = table([[[9, 1, 9, 0], [9, 9, 2, 9]]])
    ends_PGT = torch.tensor([[[0, 1, 0, 1], [0, 0, 1, 0]]])
    std = math.sqrt(2 / 3)  # of 1, 0, 2, whose mean is 1
    expected = table([[[-1, -1, -1, -1], [1, 1, 1, 0]]]) / std
    torch.testing.assert_close(process_supervised(rewards_PGT, ends_PGT), expected, rtol=1e-14, atol=0)
    assert (process_supervised(torch.ones(1, 2, 4), ends_PGT) == 0).all()
    assert (process_supervised(rewards_PGT, torch.zeros(1, 2, 4)) == 0).all()


def test_progress_is_what_a_step_changes_of_the_value_and_sums_up_to_the_last():
    values_PGT = table([[[9, 0.5, 9, 1, 9], [9, 9, 0.25, 9, 9], [0.75, 9, 9, 0, 9]]])
    ends_PGT = torch.tensor([[[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 0, 0, 1, 0]]])
    # Before the first steps: (0.5 + 0.25 + 0.75) / 3 = 0.5.
    expected = table([[[0, 0, 0, 0.5, 0], [0, 0, -0.25, 0, 0], [0.25, 0, 0, -0.75, 0]]])
    torch.testing.assert_close(progress(values_PGT, ends_PGT), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(progress(values_PGT, ends_PGT).sum(-1), table([[0.5, -0.25, -0.5]]))
    assert (progress(values_PGT, torch.zeros(1, 3, 5)) == 0).all()
    spread = table([[[0, 0, 0.5, 0.5, 0], [-0.25, -0.25, -0.25, 0, 0], [0.25, -0.75, -0.75, -0.75, 0]]])
    torch.testing.assert_close(own_step(expected, ends_PGT), spread, rtol=1e-15, atol=0)
    assert (own_step(expected, torch.zeros(1, 3, 5)) == 0).all()


def test_with_one_step_a_reply_process_supervision_is_outcome_supervision():
    rewards_PG = table([[1, 0, 0.5], [0, 0, 3]])
    ends_PGT = torch.zeros(2, 3, 5).index_fill(2, torch.tensor([4]), 1)
    spread_PGT = process_supervised(rewards_PG[..., None].expand(2, 3, 5), ends_PGT)
    torch.testing.assert_close(spread_PGT, group_normalised(rewards_PG)[..., None].expand(2, 3, 5))


def test_gae_is_its_recursion_by_hand_and_forgets_what_lies_behind_the_end():
    rewards_BT, values_BT = table([[0.0, 0.0, 1.0], [0.5, 2.0, 7.0]]), table([[0.2, 0.4, 0.6], [0.1, 0.3, 9.0]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lambda_=0.5)
    a2 = 1 - 0.6
    a1 = 0.9 * 0.6 - 0.4 + 0.45 * a2
    a0 = 0.9 * 0.4 - 0.2 + 0.45 * a1
    b1 = 2 - 0.3
    b0 = 0.5 + 0.9 * 0.3 - 0.1 + 0.45 * b1
    torch.testing.assert_close(advantages_BT, table([[a0, a1, a2], [b0, b1, 0]]), rtol=1e-14, atol=0)
    torch.testing.assert_close(returns_BT, table([[a0 + 0.2, a1 + 0.4, a2 + 0.6], [b0 + 0.1, b1 + 0.3, 0]]))
    # λ = γ = 1: the return is the sum of the rewards to come.
    torch.testing.assert_close(gae(rewards_BT, values_BT, mask_BT, 1, 1)[1], table([[1, 1, 1], [2.5, 2, 0]]))


def test_ppo_pays_the_reward_at_the_last_token_and_the_divergence_at_each():
    earned_BT = torch.zeros(3, 4, dtype=torch.float64)
    earned_BT[[0, 1, 2], [length - 1 for length in LENGTHS]] = table([3, -1, 2])
    paid_BT = token_rewards(earned_BT, table(NEW), table(REF), MASK_BT, 0.1)
    assert (token_rewards(earned_BT, table(NEW), None, MASK_BT, 0.1) == earned_BT).all()
    for i, length in enumerate(LENGTHS):
        for t in range(4):
            kl = -0.1 * (NEW[i][t] - REF[i][t]) if t < length else 0
            assert paid_BT[i, t].item() == pytest.approx(kl + (t == length - 1) * [3, -1, 2][i], abs=1e-15)


def test_the_value_loss_takes_the_worse_of_the_clipped_and_the_free_error():
    values_BT = table([[1.0, 0.0, 0.5]]).requires_grad_()
    loss = value_loss(values_BT, table([[0.0, 0.1, 9.0]]), table([[2.0, 1.0, 9.0]]), table([[1, 1, 0]]), 0.2, 2)
    assert loss.item() == pytest.approx((1.8**2 + 1) / 4, rel=1e-14)  # 0.2 is worse than 1; 0 is free
    loss.backward()
    torch.testing.assert_close(values_BT.grad, table([[0.0, -0.5, 0.0]]))


def test_dpo_is_its_formula_and_calls_add_up():
    margin_B = preference_margin(table([-5, -3]), table([-4, -7]), table([-6, -3.5]), table([-4.5, -6]))
    assert margin_B.tolist() == [0.5, 1.5]
    losses = [math.log(1 + math.exp(-0.1 * margin)) for margin in (0.5, 1.5)]
    flipped = [math.log(1 + math.exp(0.1 * margin)) for margin in (0.5, 1.5)]
    assert dpo_loss(margin_B, 0.1, 2).item() == pytest.approx(sum(losses) / 2, rel=1e-14)
    smoothed = 0.9 * sum(losses) / 2 + 0.1 * sum(flipped) / 2
    parts = [dpo_loss(margin_B[i : i + 1], 0.1, 2, label_smoothing=0.1) for i in range(2)]
    assert sum(parts).item() == pytest.approx(smoothed, rel=1e-14)


def gradient(loss, leaf):
    (made,) = torch.autograd.grad(loss, leaf)
    return made


def test_grpo_is_the_unified_update_with_its_coefficient_at_the_exploring_policy():
    logprobs_BT = table(NEW).requires_grad_()
    given = PolicyBatch(logprobs_BT, logprobs_BT.detach(), table(REF), table(ADVANTAGES)[:, None], MASK_BT)
    coefficient_BT = grpo_coefficient(given.advantages_BT, logprobs_BT, table(REF), 0.04)
    torch.testing.assert_close(
        gradient(policy_loss(given, PolicyObjective(kl_coefficient=0.04), 3)[0], logprobs_BT),
        gradient(unified_loss(logprobs_BT, coefficient_BT, MASK_BT, 3), logprobs_BT),
        rtol=1e-13,
        atol=1e-16,
    )


def test_online_rft_is_fine_tuning_on_the_right_replies():
    right_PG = table([[1, 0, 1]])
    logprobs_BT = table(NEW).requires_grad_()
    given = PolicyBatch(logprobs_BT, logprobs_BT.detach(), None, rewarded(right_PG).view(3, 1), MASK_BT)
    means_B = (logprobs_BT * MASK_BT).sum(1) / table(LENGTHS)
    expected = gradient(-(means_B[0] + means_B[2]) / 3, logprobs_BT)
    for loss in (
        policy_loss(given, ALGORITHMS["online_rft"].objective, 3)[0],
        unified_loss(logprobs_BT, right_PG.view(3, 1), MASK_BT, 3),
    ):
        torch.testing.assert_close(gradient(loss, logprobs_BT), expected, rtol=1e-13, atol=1e-16)


def test_dpo_is_the_unified_update_of_a_pair_up_to_beta_and_the_length():
    """The paper's coefficient leaves out β, and DPO's own loss has no 1/|o|: here both replies are of one token."""
    logprobs_BT = table([[-1.0], [-2.5]]).requires_grad_()  # chosen, rejected
    margin_B = preference_margin(logprobs_BT[:1, 0], logprobs_BT[1:, 0], table([-1.2]), table([-2.0]))
    coefficient_B1 = dpo_coefficient(margin_B, 0.3) * table([[1.0], [-1.0]])
    torch.testing.assert_close(
        gradient(dpo_loss(margin_B, 0.3, 1), logprobs_BT),
        0.3 * gradient(unified_loss(logprobs_BT, coefficient_B1, torch.ones(2, 1), 1), logprobs_BT),
    )


def test_importance_is_the_ratio_to_the_engine_up_to_the_cap():
    weights = truncated_importance(table([-1.0, -1.0, -2.0]), table([-1.0, -3.0, -1.0]), 2.0)
    torch.testing.assert_close(weights, table([1.0, 2.0, math.exp(-1)]))
