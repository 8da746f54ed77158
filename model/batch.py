"""Requests decoded together: prompts join, every step gives each row a token or a few, finished rows leave.

Prompts are padded on the right: a row's token at position i lies in slot i of every layer's cache, so the causal mask
alone keeps padding unseen while the prompts run, and rows of any lengths can be decoded side by side. When enough rows
have finished to be worth a copy, or when others want to join, the caches are copied without them.

On CUDA a step of many small kernels would wait for Python, so decoding is a recorded graph there: the caches never
move, a step sees slots in multiples of SLOTS and rows in powers of two (past the last row it computes what nobody
reads), and tokens are looked at every LOOK of them.

The last token of a row is always the one whose states are not in the caches yet. Letters: B rows in the batch, J rows
that join, U different prompts among them, T tokens a row, S slots, D model width, V vocabulary, M drafted tokens (0
without speculation).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from model.cache import Cache, Slots
from model.graphs import Replayed
from model.rope import rotation
from model.sampling import Sampler
from model.speculate import Drafter
from model.transformer import Block, Transformer

COMPACT_AT = 0.125  # share of finished rows at which a copy of the caches is cheaper than carrying them
SLOTS, LOOK = 64, 8  # of recorded steps

CacheDtype = Literal["float8"]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on from it. `draws_TU` holds random numbers in [0, 1), a row for each place of the reply
    and a column for each use of one (`model.sampling`)."""

    prompt: Sequence[int]
    max_new_tokens: int
    draws_TU: Tensor
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: Collection[int] = ()


@dataclass(eq=False)
class Row:
    """A request on its way. `tokens` end with the stop token if one was met; `logprobs` are those at the sampling
    temperature, before top-p. `drafted` and `accepted` count the drafts that a reply's tokens were tried against."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False  # by a stop token
    done: bool = False  # finished, at its longest, or given up by whoever asked
    drafted: int = 0
    accepted: int = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    def take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> int:
        """Append tokens up to a stop token or the longest; returns how many."""
        before = len(self.tokens)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.done:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.finished = token in self.request.stop_ids
            self.done = self.finished or len(self.tokens) == self.request.max_new_tokens
        return len(self.tokens) - before

    def take_verified(self, tokens: Sequence[int], logprobs: Sequence[float], accepted: int) -> None:
        """`take` the first accepted + 1 tokens; those behind them failed."""
        used = self.take(tokens[: accepted + 1], logprobs[: accepted + 1])
        self.drafted += min(used, len(tokens) - 1)
        self.accepted += min(used, accepted)


class Batch:
    """Rows in flight. `admit` and `step` give every row that is not done at least one token.

    With `speculate`, each MTP module drafts a token and one pass of the model verifies them all: what is sampled
    follows the same distribution (greedy: it is the same). `cache_dtype` "float8" quantises MLA's cache.
    """

    def __init__(self, model: Transformer, speculate: bool = False, cache_dtype: CacheDtype | None = None) -> None:
        self.model = model
        self.rows: list[Row] = []
        self.n_drafts = len(model.mtp) if speculate else 0
        self._blocks: list[Block] = list(model.blocks)
        self._caches: list[Cache] = [block.attention.cache(cache_dtype == "float8") for block in self._blocks]
        self._drafter = Drafter(model, cache_dtype == "float8") if speculate else None
        self._device = model.embedding.weight.device
        self._dtype = model.embedding.weight.dtype
        self._recorded = recorded(self._device) and not speculate
        self._replayed: Replayed | None = None
        self._room = 0, 0  # rows and slots
        self._cached_B, self._place_B, self._last_B = torch.zeros(3, 0, dtype=torch.int64, device=self._device)

    @property
    def n_going(self) -> int:
        return sum(not row.done for row in self.rows)

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Row]:
        """Run the prompts and draw each one's first token; returns the new rows, in the order of the requests."""
        joining = [Row(request) for request in requests]
        self._reform(joining)
        # The samples of one prompt, GRPO's groups and evaluation's, share its pass.
        unique: dict[tuple[int, ...], int] = {}
        source = [unique.setdefault(tuple(request.prompt), len(unique)) for request in requests]
        source_J = torch.tensor(source, device=self._device)
        lengths_U = torch.tensor([len(prompt) for prompt in unique], device=self._device)
        longest = max(map(len, unique))
        prompts_UT = torch.tensor([[*p, *[0] * (longest - len(p))] for p in unique], device=self._device)
        x_UTD, rope = self.model.embedding(prompts_UT), self._slots.first(longest)
        for block, cache in zip(self._blocks, self._caches, strict=True):
            x_UTD = block.prefill(x_UTD, prompts_UT, rope, cache)
            cache.spread(source_J, len(unique), longest)
        last_UD = x_UTD[torch.arange(len(unique), device=self._device), lengths_U - 1]
        logits_JV = self.model.logits(self.model.norm(last_UD))[source_J]
        lengths_J = lengths_U[source_J]
        sampler = _sampler(joining, self._device)
        tokens_J, logprobs_J = sampler.choose(logits_JV, torch.zeros_like(lengths_J))
        new = slice(len(self.rows) - len(joining), len(self.rows))
        self._cached_B[new], self._place_B[new], self._last_B[new] = lengths_J, 1, tokens_J
        for row, token, logprob in zip(joining, tokens_J.tolist(), logprobs_J.tolist(), strict=True):
            row.take([token], [logprob])
        if self._drafter:
            states_JTD = self.model.norm(x_UTD)[source_J]
            self._drafter.join(states_JTD, prompts_UT[source_J], lengths_J, tokens_J, self._slots)
        return joining

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Decode a token or a few; returns the rows that got tokens, some of which are done now."""
        going = [row for row in self.rows if not row.done]
        assert going, "nothing to decode: admit a request first"
        if self._width(len(going)) <= (1 - COMPACT_AT) * len(self._last_B):
            self._reform([])
        longest = max(row.length for row in going)
        if self._drafter:
            self._step_speculating(self._drafter, longest + self.n_drafts)
        else:
            self._step_plainly(longest)
        return going

    def _step_plainly(self, longest: int) -> None:
        n_rows, tokens, logprobs = len(self.rows), [], []
        for number in range(LOOK if self._recorded else 1):
            states_BTD = self._decode(self._last_B[:, None], self._seen(longest + number))
            logits_NV = self.model.logits(states_BTD[:n_rows, 0])
            tokens_N, logprobs_N = self._sampler.choose(logits_NV, self._place_B[:n_rows])
            self._last_B[:n_rows] = tokens_N
            self._advance(1)
            tokens.append(tokens_N)
            logprobs.append(logprobs_N)
        found = zip(torch.stack(tokens, dim=1).tolist(), torch.stack(logprobs, dim=1).tolist(), strict=True)
        for row, taken in zip(self.rows, found, strict=True):
            row.take(*taken)

    def _step_speculating(self, drafter: Drafter, seen: int) -> None:
        drafts_BM, guesses_BMV = drafter.propose(self._sampler, self._cached_B, self._place_B, self._slots, seen)
        states_BTD = self._decode(torch.cat([self._last_B[:, None], drafts_BM], dim=1), seen)
        verified = self._sampler.verify(self.model.logits(states_BTD), drafts_BM, guesses_BMV, self._place_B)
        for row, *found in zip(self.rows, *(x.tolist() for x in verified), strict=True):
            row.take_verified(*found)
        tokens_BT, _, accepted_B = verified
        drafter.follow(states_BTD, tokens_BT, accepted_B)
        self._last_B = tokens_BT.gather(1, accepted_B[:, None])[:, 0]
        self._advance(accepted_B + 1)

    def _advance(self, n_new: Tensor | int) -> None:
        self._place_B = self._place_B + n_new
        # Rows that are done run along until they are taken out: not past their slots.
        self._cached_B = (self._cached_B + n_new).clamp_max(self._slots.count - 1 - self.n_drafts)

    def _decode(self, tokens_BT: Tensor, seen: int) -> Tensor:
        """Run T tokens of each row, the first behind what is cached; returns states [B, T, D] behind the final norm."""
        if self._replayed:
            return self._replayed(tokens_BT, self._cached_B, seen=seen)[0]
        return self._states(tokens_BT, self._cached_B, seen)[0]

    def _states(self, tokens_BT: Tensor, cached_B: Tensor, seen: int) -> list[Tensor]:
        x_BTD = self.model.embedding(tokens_BT)
        places_T = torch.arange(tokens_BT.shape[1], device=self._device)
        step = self._slots.step(cached_B[:, None] + places_T, seen)
        for block, cache in zip(self._blocks, self._caches, strict=True):
            x_BTD = block.decode(x_BTD, tokens_BT, step, cache)
        return [self.model.norm(x_BTD)]

    def _width(self, rows: int) -> int:
        """How many rows a step computes."""
        return 1 << max(rows - 1, 0).bit_length() if self._recorded else rows

    def _seen(self, slots: int) -> int:
        """How many slots a step reads."""
        return min(-(-slots // SLOTS) * SLOTS, self._slots.count) if self._recorded else slots

    def _reform(self, joining: list[Row]) -> None:
        """Take out the rows that are done and make room for those that join."""
        kept = [number for number, row in enumerate(self.rows) if not row.done]
        kept_K = torch.tensor(kept, dtype=torch.int64, device=self._device)
        filled = max((self.rows[number].length - 1 for number in kept), default=0)
        self.rows = [*(self.rows[number] for number in kept), *joining]
        width = self._width(len(self.rows))
        self._make_room(width)
        for cache in [*self._caches, *(self._drafter.caches if self._drafter else ())]:
            cache.resize(kept_K, len(self.rows), self._room, filled, self._dtype)
        if self._drafter:
            self._drafter.keep(kept_K)
        new_J = torch.zeros(width - len(kept), dtype=torch.int64, device=self._device)
        self._cached_B, self._place_B, self._last_B = (
            torch.cat([state_B[kept_K], new_J]) for state_B in (self._cached_B, self._place_B, self._last_B)
        )
        self._sampler = _sampler(self.rows, self._device)

    def _make_room(self, width: int) -> None:
        """Rows and slots for all that are in the batch; where steps are recorded, never less than there was."""
        n_slots = max(len(row.request.prompt) + row.request.max_new_tokens for row in self.rows) + self.n_drafts
        room = (max(width, self._room[0]), max(n_slots, self._room[1])) if self._recorded else (width, n_slots)
        if room == self._room:
            return
        self._room = room
        self._slots = Slots(
            room[1], rotation(self.model.config, torch.arange(room[1], device=self._device), self._dtype)
        )
        self._replayed = Replayed(self._states, shared=True) if self._recorded else None


def recorded(device: torch.device) -> bool:
    """Whether decoding steps are recorded there and replayed."""
    return device.type == "cuda"


def _sampler(rows: Sequence[Row], device: torch.device) -> Sampler:
    requests = [row.request for row in rows]
    return Sampler(
        [request.temperature for request in requests],
        [request.top_p for request in requests],
        [request.draws_TU for request in requests],
        device,
    )
