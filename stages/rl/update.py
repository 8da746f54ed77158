"""Gradient steps on explored replies: the policy's and, where a critic gives the baseline, the critic's beside it.

Legend: B replies of R tokens (right-padded).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.optimizer import build_optimizer
from model.transformer import Transformer
from model.value import ValueModel
from stages.rl.critic import gae, token_rewards, value_loss
from stages.rl.micro_batch import Credited, MicroBatch, micro_batches, token_logprobs, token_values
from stages.rl.mismatch import check_mismatch, mismatch, truncated_importance
from stages.rl.policy_loss import PolicyBatch, policy_loss
from stages.rl.rollout import Rollout
from stages.rl.tally import Tally
from stages.training.distributed import GradientBucket, Ranks, clip_factor
from stages.training.trainer import TrainingDiverged

if TYPE_CHECKING:
    from stages.grpo import GrpoConfig


class Trained:
    """A model with its optimiser and the bucket of its gradients."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        n_statistics: int = 0,
        split: Iterable[Tensor] = (),
    ) -> None:
        self.model, self.learning_rate = model, learning_rate
        self.optimizer = build_optimizer(model, learning_rate, weight_decay, split=split)
        self.bucket = GradientBucket([p for p in model.parameters() if p.requires_grad], n_statistics)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self, share: float, max_norm: float) -> float:
        """Move by the bucket's gradients at `share` of the learning rate; their norm before it was clipped."""
        norm = self.bucket.norm()
        if not math.isfinite(norm):
            raise TrainingDiverged(f"gradient norm {norm}; lower the learning rate or max_gradient_norm")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share
        if norm > 0:  # no contrast on any rank: nothing to learn, and momentum alone shall not move the weights
            self.optimizer.step(clip_factor(norm, max_norm))
        return norm


@dataclasses.dataclass(frozen=True)
class FirstLook:
    """What the first pass over a micro-batch saw, and later updates hold on to."""

    old_BR: Tensor
    reference_BR: Tensor | None
    correction_BR: Tensor | None
    advantages_BR: Tensor
    old_values_BR: Tensor | None
    returns_BR: Tensor | None


class Update:
    """`updates_per_exploration` gradient steps on the same replies (1 in the papers: the ratio is exactly 1)."""

    def __init__(
        self,
        config: GrpoConfig,
        policy: Transformer,
        critic: ValueModel | None,
        pad: int,
        ranks: Ranks,
    ) -> None:
        self.config, self.pad, self.ranks = config, pad, ranks
        decay = config.weight_decay

        def split(trunk: Transformer) -> Iterable[Tensor]:
            return trunk.low_precision_weights() if config.precision == "bf16" else ()

        self.policy = Trained(policy, config.learning_rate, decay, n_statistics=2, split=split(policy))
        self.critic = Trained(critic, config.critic.learning_rate, decay, split=split(critic.trunk)) if critic else None
        self.reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coefficient else None
        # With a critic the divergence from the reference is paid for in the rewards (DeepSeekMath, equation 2).
        self.objective = dataclasses.replace(config.objective, kl_coefficient=0.0) if critic else config.objective

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state(),
            "critic": self.critic.state() if self.critic else None,
            "reference": self.reference.state_dict() if self.reference else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.policy.load(state["policy"])
        if self.critic:
            self.critic.load(state["critic"])
        if self.reference:
            self.reference.load_state_dict(state["reference"])

    def renew_reference(self) -> None:
        """From now on the reference is the policy as it is."""
        if self.reference:
            self.reference.load_state_dict(self.policy.model.state_dict())

    def learn(
        self,
        number: int,
        batch: Sequence[Credited],
        replies: float,
        tokens: float,
        tally: Tally,
        looked_at: Sequence[Rollout] = (),
    ) -> None:
        """Learn from this rank's `batch` in step `number`; `replies` and `tokens` are those of all ranks that count.

        An engine that has gone astray may earn the same for all that it says, and then there is nothing to learn from:
        its mismatch is measured on the replies of `looked_at` too.
        """
        config = self.config
        normaliser = self.objective.normaliser(replies, tokens, config.max_new_tokens)
        cut = micro_batches(batch, self.pad, config.micro_batch_tokens, self.ranks.device)
        share = min(1.0, (number + 1) / max(config.warmup_steps, 1))
        looks: list[FirstLook] = []
        for update in range(config.updates_per_exploration):
            self.policy.bucket.zero()
            if self.critic:
                self.critic.bucket.zero()
            if update == 0:
                self.look(looked_at, tally)
            for index, micro in enumerate(cut):
                logprobs_BR = token_logprobs(self.policy.model, micro, config.temperature)
                values_BR = token_values(self.critic.model, micro) if self.critic else None
                if update == 0:
                    looks.append(self.first_look(micro, logprobs_BR.detach(), values_BR, tally))
                look = looks[index]
                loss, metrics = policy_loss(
                    PolicyBatch(
                        logprobs_BR,
                        look.old_BR,
                        look.reference_BR,
                        look.advantages_BR,
                        micro.mask_BR,
                        look.correction_BR,
                    ),
                    self.objective,
                    normaliser,
                )
                loss.backward()
                self.policy.bucket.collect()
                tally.add(
                    loss=loss.item() / config.updates_per_exploration,
                    kl=metrics.kl,
                    clipped=metrics.clipped,
                    loss_tokens=metrics.tokens,
                )
                tally.peak(max_ratio=metrics.max_ratio)
                if self.critic and values_BR is not None:
                    assert look.old_values_BR is not None
                    assert look.returns_BR is not None
                    error = value_loss(
                        values_BR, look.old_values_BR, look.returns_BR, micro.mask_BR, config.critic.clip, tokens
                    )
                    error.backward()
                    self.critic.bucket.collect()
                    tally.add(value_loss=error.item() / config.updates_per_exploration)
            self.policy.bucket.reduce(self.ranks)
            if update == 0:
                check_mismatch(number + 1, *self.policy.bucket.statistics.tolist(), config.max_mismatch_kl)
            norm = self.policy.step(share, config.max_gradient_norm)
            tally.peak(gradient_norm=norm)
            if self.critic:
                self.critic.bucket.reduce(self.ranks)
                self.critic.step(share, config.max_gradient_norm)

    @torch.no_grad()
    def look(self, rollouts: Sequence[Rollout], tally: Tally) -> None:
        """Measure the engine's mismatch on replies that are not learnt from."""
        credited = [(rollout, [0.0] * len(rollout.tokens)) for rollout in rollouts]
        for micro in micro_batches(credited, self.pad, self.config.micro_batch_tokens, self.ranks.device):
            self.compare(micro, token_logprobs(self.policy.model, micro, self.config.temperature), tally)

    def compare(self, micro: MicroBatch, logprobs_BR: Tensor, tally: Tally) -> None:
        """Count the engine's mismatch."""
        seen = mismatch(logprobs_BR[micro.mask_BR], micro.engine_logprobs_BR[micro.mask_BR])
        tally.add(compared_tokens=seen.tokens, mismatch_kl=seen.kl_sum)
        tally.peak(mismatch_max_ratio=seen.max_ratio)
        self.policy.bucket.statistics.add_(torch.tensor([seen.kl_sum, seen.tokens], device=logprobs_BR.device))

    @torch.no_grad()
    def first_look(self, micro: MicroBatch, old_BR: Tensor, values_BR: Tensor | None, tally: Tally) -> FirstLook:
        """Measure the engine's mismatch, and fix what does not move while the replies are learnt from."""
        config = self.config
        self.compare(micro, old_BR, tally)
        reference_BR = token_logprobs(self.reference, micro, config.temperature) if self.reference else None
        cap, correction_BR = config.importance_cap, None
        if cap:
            correction_BR = truncated_importance(old_BR, micro.engine_logprobs_BR, cap)
        if values_BR is None:
            return FirstLook(old_BR, reference_BR, correction_BR, micro.credit_BR, None, None)
        values_BR = values_BR.detach()
        paid_BR = token_rewards(micro.credit_BR, old_BR, reference_BR, micro.mask_BR, config.kl_coefficient)
        advantages_BR, returns_BR = gae(
            paid_BR, values_BR, micro.mask_BR, config.critic.gamma, config.critic.gae_lambda
        )
        return FirstLook(old_BR, reference_BR, correction_BR, advantages_BR, values_BR, returns_BR)
