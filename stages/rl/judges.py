"""Rewards that models give, beside the rules: one for a whole reply, one for each of its steps (DeepSeek-R1, 2.3.4).

A preference model says by its own target what it looks at: the answer without the chain (helpfulness), or the whole
response (harmlessness); one of each may judge side by side. Where open problems stand beside those with right answers
they judge the open ones alone, for rules cannot be hacked as they can. A process model scores the steps that
`steps.split_steps` cuts, but none of an open problem, for no step leads to an answer there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from stages.rl.reward_model import RewardModel
from stages.rl.rollout import Rollout, forward_flops
from stages.rl.steps import split_steps
from stages.tokens.bpe import Tokenizer


class WeightedModel(NamedTuple):
    """A preference model, and what a point of it is worth."""

    model: RewardModel
    weight: float


@dataclasses.dataclass(frozen=True)
class Judges:
    """The models that are there: preference models by their names in `rewards`, and a process model."""

    preference: Mapping[str, WeightedModel] = dataclasses.field(default_factory=dict)
    process: RewardModel | None = None
    open_only: bool = False  # preference models leave problems with right answers to the rules

    def judge(self, rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> list[Rollout]:
        """The rollouts with what the models say of them."""
        judged = list(rollouts)
        for name, (model, weight) in self.preference.items():
            points = iter(_points(model, [rollout for rollout in judged if self._prefers(rollout)]))
            judged = [_paid(one, name, next(points), weight) if self._prefers(one) else one for one in judged]
        if self.process:
            cut = [[] if one.problem.open else split_steps(one.text) for one in judged]
            chains = [(one.problem.question, steps) for one, steps in zip(judged, cut, strict=True) if steps]
            scores = iter(self.process.score_chains(chains))
            judged = [
                one if one.problem.open else _stepped(one, steps, next(scores) if steps else [], tokenizer)
                for one, steps in zip(judged, cut, strict=True)
            ]
        return judged

    def _prefers(self, rollout: Rollout) -> bool:
        return rollout.problem.open or not self.open_only

    @property
    def names(self) -> list[str]:
        """Those of `rewards.JUDGED` that they give."""
        return [*self.preference, *(["process"] if self.process else [])]

    def flops(self, rollouts: Sequence[Rollout]) -> float:
        """What judging them costs."""
        preferred = [rollout for rollout in rollouts if self._prefers(rollout)]
        stepped = [rollout for rollout in rollouts if not rollout.problem.open]
        asked = [(judge.model, preferred) for judge in self.preference.values()]
        asked += [(self.process, stepped)] if self.process else []
        return sum(forward_flops(judge.model.config, said, head=False) for judge, said in asked)


def step_ends(tokens: Sequence[int], steps: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The place of the token with which each step ends; the last step ends with the reply, its EOS included."""
    ends, end, place = [], 0, 0
    for step in steps[:-1]:
        end += len(step)
        low, high = place, len(tokens) - 1  # the fewest tokens that say all up to here
        while low < high:
            middle = (low + high) // 2
            said = tokenizer.decode(tokens[: middle + 1], skip_special=False).rstrip("\ufffd")  # half a character
            low, high = (low, middle) if len(said) >= end else (middle + 1, high)
        place = low
        ends.append(place)
    return [*ends, len(tokens) - 1] if steps else []


def _points(judge: RewardModel, rollouts: Sequence[Rollout]) -> list[float]:
    """What the preference model says of each reply. It has learnt from whole replies: one that was cut off, says
    nothing under its target or has marks of its template in it is worth the least that another to its problem is."""
    fit = [rollout for rollout in rollouts if rollout.finished and judge.can_judge(rollout.text)]
    scores = dict(zip(map(id, fit), judge.score([_conversation(rollout) for rollout in fit]), strict=True))
    least: dict[str, float] = {}
    for rollout in fit:
        least[rollout.problem.id] = min(scores[id(rollout)], least.get(rollout.problem.id, math.inf))
    return [scores.get(id(rollout), least.get(rollout.problem.id, 0.0)) for rollout in rollouts]


def _conversation(rollout: Rollout) -> list[dict[str, str]]:
    question = {"role": "user", "content": rollout.problem.question}
    return [question, {"role": "assistant", "content": rollout.text}]


def _paid(rollout: Rollout, name: str, points: float, weight: float) -> Rollout:
    verdict = rollout.score
    rules = {**verdict.rules, name: points}
    return dataclasses.replace(
        rollout, score=dataclasses.replace(verdict, reward=verdict.reward + weight * points, rules=rules)
    )


def _stepped(rollout: Rollout, steps: Sequence[str], scores: Sequence[float], tokenizer: Tokenizer) -> Rollout:
    ends = step_ends(rollout.tokens, steps, tokenizer)
    rules = {**rollout.score.rules, "process": fmean(scores) if scores else 0.0}
    return dataclasses.replace(
        rollout,
        steps=tuple(zip(ends, scores, strict=True)),
        score=dataclasses.replace(rollout.score, rules=rules),
    )
