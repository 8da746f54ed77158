"""Exploring: groups of replies to each question, read back, scored, and kept chunk by chunk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from hashlib import sha256

import torch

from model.config import ModelConfig
from stages.problems.problem import Language, Problem
from stages.rl.engines.base import Engine, Sampling
from stages.rl.group_rewards import pay_groups
from stages.rl.judges import Judges
from stages.rl.prompts import Template, prompt_ids, reply_text
from stages.rl.rewards import RewardWeights, Score, score
from stages.rl.rollout import Rollout, forward_flops
from stages.rl.rollout_store import RolloutStore, weights_digest
from stages.rl.scoring import score_all
from stages.tokens.bpe import Tokenizer


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put, how often, and what the replies are paid for."""

    template: Template
    sampling: Sampling
    group_size: int
    rewards: RewardWeights
    target_language: Language | None = None  # None: each question's own
    examples: tuple[Problem, ...] = ()  # shown in front of a question of the same family and language
    system_prompt: str | None = None


class Explorer:
    """Asks an engine and scores what it replies, or reads from the store what it replied before a kill.

    A chunk of questions is generated together and owns its seed, so its replies are a function of the weights, the
    seed, the questions and the asking, however many ranks share the chunks.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model: ModelConfig,
        asking: Asking,
        store: RolloutStore,
        judges: Judges | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.model, self.asking, self.store = engine, tokenizer, model, asking, store
        self.judges = judges or Judges()
        self._weights = ""

    def take(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Explore with these weights from now on."""
        weights = list(named_tensors)
        self.engine.update_weights(weights)
        self._weights = weights_digest(weights)

    def chunk(self, step: int, chunk: int, first: int, problems: Sequence[Problem], seed: int) -> list[Rollout]:
        """`group_size` replies to each problem, side by side; their groups are numbered from `first` in the step."""
        key = self._key(problems, seed)
        rows = self.store.get(step, chunk, key)
        if rows is not None:
            return [Rollout.from_row(row) for row in rows]
        rollouts = self._ask(problems, seed)
        size = self.asking.group_size
        self.store.put(
            step,
            chunk,
            key,
            (
                rollout.row(step, first + place // size, place % size, forward_flops(self.model, [rollout]))
                for place, rollout in enumerate(rollouts)
            ),
        )
        return rollouts

    def _key(self, problems: Sequence[Problem], seed: int) -> str:
        asking = dataclasses.asdict(self.asking) | {"rewards": self.asking.rewards.model_dump()}
        parts = [
            type(self.engine).__name__,
            self._weights,
            self.judges.names,
            seed,
            asking,
            [problem.to_json() for problem in problems],
        ]
        return sha256(json.dumps(parts).encode()).hexdigest()

    def _ask(self, problems: Sequence[Problem], seed: int) -> list[Rollout]:
        asking, tokenizer = self.asking, self.tokenizer
        prompts = [
            prompt_ids(
                problem.question,
                asking.template,
                tokenizer,
                similar(asking.examples, problem),
                asking.system_prompt,
                problem.language,
            )
            for problem in problems
        ]
        asked = [pair for pair in zip(problems, prompts, strict=True) for _ in range(asking.group_size)]
        replies = self.engine.generate([prompt for _, prompt in asked], asking.sampling, seed)
        texts = [reply_text(reply.tokens, tokenizer) for reply in replies]

        def judge(place: int) -> Score:
            reply, (problem, _) = replies[place], asked[place]
            length = len(reply.tokens), asking.sampling.max_new_tokens
            return score(problem, texts[place], reply.finished, asking.rewards, asking.target_language, *length)

        scores = score_all(judge, range(len(asked)), [problem for problem, _ in asked])
        scores = pay_groups(scores, [len(reply.tokens) for reply in replies], asking.group_size, asking.rewards)
        rollouts = [
            Rollout(problem, prompt, reply.tokens, reply.logprobs, reply.finished, text, verdict)
            for (problem, prompt), reply, text, verdict in zip(asked, replies, texts, scores, strict=True)
        ]
        return self.judges.judge(rollouts, tokenizer)


def similar(examples: Sequence[Problem], problem: Problem) -> list[Problem]:
    """The examples of the problem's family and language."""
    return [one for one in examples if (one.family, one.language) == (problem.family, problem.language)]
