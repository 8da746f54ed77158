"""What every engine can do. A prompt and a reply are lists of token ids; text is the caller's business."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw. temperature 0 is greedy. Log-probabilities are those under `temperature`, before top-p."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply: its tokens (a stop token included), the log-probability of each, and whether it stopped by itself."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Engine(Protocol):
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Reply]:
        """One reply a prompt, in order; the same seed and the same prompts give the same replies."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the learner's weights, under our own parameter names; all of them, at once."""
        ...
