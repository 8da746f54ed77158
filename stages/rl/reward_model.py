"""A reward model as others use it: a folder that scores conversations, or the steps of a chain.

    model.safetensors, model.json, tokenizer…   a ValueModel as stages/training/checkpoint.py saves it
    reward_model.json                           what it was trained to judge: the target below

`response`  the whole last turn of the assistant (R1's harmlessness; Bradley–Terry).
`answer`    that turn without its chain of thought (R1's helpfulness, "the final summary": section 2.3.4).
`steps`     each step of a reply on its own (Math-Shepherd, 2312.08935; DeepSeekMath's process supervision).

Legend: B sequences, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from infra.errors import InputError
from model.value import ValueModel
from stages.rl.prompts import prompt_ids
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.chat_template import render
from stages.training.checkpoint import load_value_model, save_model

CONFIG = "reward_model.json"
Target = Literal["response", "answer", "steps"]
Conversation = Sequence[Mapping[str, str]]
Placed = tuple[list[int], list[int]]  # token ids, and the positions whose values are the scores


class RewardModel:
    """Scores in the order asked; what runs together is of about one length, at most `max_tokens` padded tokens."""

    def __init__(self, model: ValueModel, tokenizer: Tokenizer, target: Target, max_tokens: int = 16384) -> None:
        self.model, self.tokenizer, self.target, self.max_tokens = model, tokenizer, target, max_tokens

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward of each conversation's last turn, a number without bounds: only differences mean something.

        Raises InputError for a conversation whose last turn is not the assistant's, and from a model of steps.
        """
        if self.target == "steps":
            raise InputError("this reward model scores steps: call score_chains, or train one of responses or answers")
        placed = [place_reply(messages, self.target, self.tokenizer) for messages in conversations]
        return [values[0] for values in self._values(placed)]

    def can_judge(self, reply: str) -> bool:
        """Whether a reply says anything under the target, in words and not in marks of the model's own template."""
        said = judged(reply, self.target)
        return bool(said.strip()) and not any(mark in said for mark in self.tokenizer.special_ids)

    def score_chains(self, chains: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """How likely each step of (question, steps) is right, in [0, 1]. `steps` are `split_steps` of the whole reply,
        `<think>` included. Raises InputError from a model of whole replies."""
        if self.target != "steps":
            raise InputError(f"this reward model judges the {self.target}: call score, or train one with label_steps")
        return self.step_probabilities([place_steps(question, steps, self.tokenizer) for question, steps in chains])

    def step_probabilities(self, placed: Sequence[Placed]) -> list[list[float]]:
        """`score_chains` of what `place_steps` gives."""
        return [torch.tensor(values).sigmoid().tolist() for values in self._values(placed)]

    @torch.no_grad()
    def _values(self, placed: Sequence[Placed]) -> list[list[float]]:
        """The value at every place of every sequence."""
        device = self.model.head.weight.device
        found: list[list[float]] = [[] for _ in placed]
        order = sorted(range(len(placed)), key=lambda i: len(placed[i][0]), reverse=True)
        while order:
            width = len(placed[order[0]][0])
            taken, order = order[: max(1, self.max_tokens // width)], order[max(1, self.max_tokens // width) :]
            tokens_BT = torch.full((len(taken), width), self.tokenizer.pad)
            for row, i in enumerate(taken):  # padded on the right, where no position that counts looks
                tokens_BT[row, : len(placed[i][0])] = torch.tensor(placed[i][0])
            values_BT = self.model(tokens_BT.to(device)).cpu()
            for row, i in enumerate(taken):
                found[i] = values_BT[row, placed[i][1]].tolist()
        return found


def place_reply(messages: Conversation, target: Target, tokenizer: Tokenizer) -> Placed:
    """A conversation that ends with the assistant, judged at the EOS of its last turn."""
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError("a reward model scores the last turn, which must be the assistant's: add the reply")
    *before, last = messages
    ids, mask = render([*before, {**last, "content": judged(last["content"], target)}], tokenizer)
    place = len(mask) - 1 - mask[::-1].index(1)
    return ids[: place + 1], [place]


def place_steps(question: str, steps: Sequence[str], tokenizer: Tokenizer) -> Placed:
    """A question and the steps of a reply to it, each judged at its last token."""
    ids, places = prompt_ids(question, "chat", tokenizer), []
    for step in steps:
        ids += tokenizer.encode(step)
        places.append(len(ids) - 1)
    return ids, places


def judged(reply: str, target: Target) -> str:
    """What of a reply is looked at. A chain that never ends has no answer, so leaving `</think>` out hides nothing."""
    if target != "answer" or "<think>" not in reply:
        return reply
    return reply.rpartition("</think>")[2] if "</think>" in reply else ""


def save_reward_model(directory: Path | str, model: ValueModel, target: Target, tokenizer_dir: Path | str) -> None:
    """Write a `reward_model` artifact's files; `tokenizer_dir` is any folder that holds the tokenizer."""
    save_model(directory, model, tokenizer_dir)
    (Path(directory) / CONFIG).write_text(json.dumps({"target": target}) + "\n", encoding="utf-8")


def load_reward_model(directory: Path | str, device: str = "cpu") -> RewardModel:
    """The reward model in an artifact's folder, ready to score. Raises InputError where there is none."""
    return RewardModel(load_value_model(directory, device), load_tokenizer(directory), load_target(directory))


def load_target(directory: Path | str) -> Target:
    """What the reward model in a folder judges."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} is no reward model: it has no {CONFIG}; make one with train_reward_model")
    return json.loads(path.read_text(encoding="utf-8"))["target"]
