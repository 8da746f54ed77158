"""Batched sampling from a model: whole completions, or their tokens as they come.

The work is `model.batch`'s: prompts join as rows finish, so that a batch stays full while any prompt waits. Which
random number decides which token depends on the prompt's index and the place in its reply alone (`model.sampling`), so
batching never changes a sample beyond rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from infra.errors import InputError
from model.batch import COMPACT_AT, Batch, CacheDtype, Request, Row
from model.config import ModelConfig
from model.sampling import N_USES
from model.transformer import Transformer


@dataclass(frozen=True)
class Completion:
    """What followed one prompt: the tokens (a stop token included), each one's log-probability at the sampling
    temperature before top-p, and whether a stop token ended it (else max_new_tokens did). With speculation: how many
    drafts were tried and how many were accepted."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Piece:
    """New tokens of prompt number `number`; `done` on its last piece, and `finished` if a stop token ended it."""

    number: int
    tokens: list[int]
    logprobs: list[float]
    done: bool
    finished: bool

    @classmethod
    def of(cls, row: Row, number: int, given: int) -> Self:
        """What a row has beyond its first `given` tokens."""
        return cls(number, row.tokens[given:], row.logprobs[given:], row.done, row.finished)


class Generator:
    """Samples from a model, `max_batch` prompts at a time. Reads the model's weights as they are at each call.

    `speculate` drafts with the model's MTP modules, `cache_dtype` "float8" quantises MLA's cache (`model.batch`). The
    caches stay from one call to the next, and with them the graphs that were recorded on a GPU.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch: int = 256,
        speculate: bool = False,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        self.model, self.max_batch = model, max_batch
        self.speculate, self.cache_dtype = speculate, cache_dtype
        self._idle: tuple[list[int], Batch] | None = None  # the addresses of the weights it reads, and a batch

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_ids: Collection[int] = (),
        generator: torch.Generator | None = None,
        given_up: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order. temperature 0 is greedy (log-probabilities then at temperature 1).

        A reply for whose tokens so far `given_up` is true goes no further; it counts as not finished.

        Raises InputError if a prompt is empty, or with its reply longer than the model's max_position.
        """
        rows: dict[int, Row] = {}
        for advanced in self._run(prompts, max_new_tokens, temperature, top_p, stop_ids, generator):
            rows.update(advanced)
            for _, row in advanced if given_up else ():
                row.done = row.done or given_up(row.tokens)
        found = (rows[number] for number in range(len(prompts)))
        return [Completion(row.tokens, row.logprobs, row.finished, row.drafted, row.accepted) for row in found]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_ids: Collection[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Piece]:
        """`generate`, piece by piece as the tokens are sampled; the pieces of a prompt make up its completion."""
        given = [0] * len(prompts)
        for advanced in self._run(prompts, max_new_tokens, temperature, top_p, stop_ids, generator):
            for number, row in advanced:
                yield Piece.of(row, number, given[number])
                given[number] = len(row.tokens)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop_ids: Collection[int],
        generator: torch.Generator | None,
    ) -> Iterator[list[tuple[int, Row]]]:
        """After each step, the rows that got tokens and the numbers of their prompts."""
        for prompt in prompts:
            check_request(self.model.config, len(prompt), max_new_tokens)
        shape = (len(prompts), max_new_tokens, N_USES if self.speculate else 1)
        draws_PTU = torch.rand(shape, generator=generator, device=self.model.embedding.weight.device)
        requests = [
            Request(prompt, max_new_tokens, draws_TU, temperature, top_p, frozenset(stop_ids))
            for prompt, draws_TU in zip(prompts, draws_PTU, strict=True)
        ]
        weights = [weight.data_ptr() for weight in self.model.parameters()]
        idle, self._idle = self._idle, None
        batch = idle[1] if idle and idle[0] == weights else Batch(self.model, self.speculate, self.cache_dtype)
        waiting = deque(sorted(range(len(prompts)), key=lambda number: len(prompts[number])))  # little padding
        numbers: dict[Row, int] = {}
        while waiting or batch.n_going:
            room = self.max_batch - batch.n_going
            if waiting and room >= min(len(waiting), COMPACT_AT * self.max_batch):
                chosen = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                rows = batch.admit([requests[number] for number in chosen])
                numbers.update(zip(rows, chosen, strict=True))
            else:
                rows = batch.step()
            yield [(numbers[row], row) for row in rows]
        self._idle = weights, batch


def check_request(config: ModelConfig, prompt_length: int, max_new_tokens: int) -> None:
    """Raise InputError unless a prompt of that length can be answered at that length."""
    if prompt_length == 0:
        raise InputError("cannot generate from an empty prompt: begin it with the BOS token")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: a reply has at least one token")
    if prompt_length + max_new_tokens > config.max_position:
        raise InputError(
            f"a prompt of {prompt_length} tokens and max_new_tokens={max_new_tokens} exceed the model's max_position "
            f"({config.max_position}): shorten them or extend the context"
        )


def acceptance_rate(completions: Iterable[Completion]) -> float:
    """Share of tried drafts that were accepted: with one MTP module, V3's acceptance of the second token."""
    completions = list(completions)
    return sum(c.accepted for c in completions) / max(1, sum(c.drafted for c in completions))
