"""Drafting with the multi-token-prediction modules (DeepSeek-V3, section 5.4.3).

A row of n tokens has states h_0 … h_{n-2} of the main model. Module k at position i takes h^{k-1}_i and token i + k and
guesses token i + k + 1, so at position n - 2 the modules guess tokens n, n + 1, … one after another, each fed with the
last guess; one pass of the main model then verifies them all (`Sampler.verify`).

Each module has a KV cache over the positions. What module k wrote at its last k - 1 positions was fed with guesses, and
a round adds up to M + 1 verified tokens, so every round runs the modules over the last W = 2M positions anew: that
covers both, and a slot is written again with what it holds wherever nothing has changed. Rows shorter than W repeat
position 0. Letters: B rows, J rows that join, M modules and drafts, W positions run in a round, T = M + 1 verified
tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import InputError
from model.cache import Cache, Slots
from model.sampling import Sampler
from model.transformer import MultiTokenPrediction, Transformer


class Drafter:
    """The modules' caches, and of each row the last W states and the last W tokens."""

    def __init__(self, model: Transformer, float8: bool = False) -> None:
        if not len(model.mtp):
            raise InputError("speculation drafts with multi-token-prediction modules and this model has none (n_mtp=0)")
        self.model = model
        self.modules: list[MultiTokenPrediction] = list(model.mtp)
        self.caches: list[Cache] = [module.block.attention.cache(float8) for module in self.modules]
        self.window = 2 * len(self.modules)
        weight = model.embedding.weight
        self.states_BWD = weight.new_zeros(0, self.window, weight.shape[1])
        self.tokens_BW = torch.zeros(0, self.window, dtype=torch.int64, device=weight.device)

    def keep(self, kept_K: Tensor) -> None:
        """Drop all rows but these."""
        self.states_BWD, self.tokens_BW = self.states_BWD[kept_K], self.tokens_BW[kept_K]

    def join(self, states_JTD: Tensor, prompts_JT: Tensor, lengths_J: Tensor, first_J: Tensor, slots: Slots) -> None:
        """Run the prompts of new rows, whose first sampled tokens are `first_J`, through the modules."""
        length = prompts_JT.shape[1]
        padded_JX = F.pad(prompts_JT, (0, len(self.modules)))
        hidden_JTD = states_JTD
        for depth, (module, cache) in enumerate(zip(self.modules, self.caches, strict=True), start=1):
            tokens_JT = padded_JX[:, depth : depth + length]  # the last ones: the round's to mend
            embedded_JTD = self.model.embedding(tokens_JT)
            hidden_JTD = module.prefill(hidden_JTD, embedded_JTD, tokens_JT, slots.first(length), cache)
        places_JW = lengths_J[:, None] - self.window + torch.arange(self.window, device=lengths_J.device)
        self.states_BWD = torch.cat([self.states_BWD, _rows(states_JTD, places_JW.clamp_min(0))])
        sequences_JX = padded_JX.scatter(1, lengths_J[:, None], first_J[:, None])
        self.tokens_BW = torch.cat([self.tokens_BW, sequences_JX.gather(1, (places_JW + 1).clamp_min(0))])

    def propose(
        self, sampler: Sampler, cached_B: Tensor, place_B: Tensor, slots: Slots, seen: int
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts [B, M] of the next tokens and what each was drawn from, [B, M, V] (None if all rows are greedy).

        `cached_B` counts the tokens of each row that the main model has run, n - 1.
        """
        window_W = torch.arange(self.window, device=cached_B.device)
        index_BW = torch.maximum(window_W, self.window - cached_B[:, None])
        step = slots.step(cached_B[:, None] - self.window + index_BW, seen)
        hidden_BWD, known_BX, guesses = _rows(self.states_BWD, index_BW), self.tokens_BW, []
        for depth, (module, cache) in enumerate(zip(self.modules, self.caches, strict=True)):
            tokens_BW = known_BX.gather(1, index_BW + depth)
            hidden_BWD = module.decode(hidden_BWD, self.model.embedding(tokens_BW), tokens_BW, step, cache)
            draft_B, guess_BV = sampler.draft(self.model.logits(hidden_BWD[:, -1]), place_B + depth)
            known_BX = torch.cat([known_BX, draft_B[:, None]], dim=1)
            guesses.append(guess_BV)
        drafts_BM = known_BX[:, self.window :]
        return drafts_BM, None if sampler.greedy else torch.stack(guesses, dim=1)

    def follow(self, states_BTD: Tensor, tokens_BT: Tensor, accepted_B: Tensor) -> None:
        """Take over the states of the verified tokens, and the tokens sampled: the first accepted + 1 of each row."""
        index_BW = torch.arange(self.window, device=accepted_B.device) + accepted_B[:, None] + 1
        self.states_BWD = _rows(torch.cat([self.states_BWD, states_BTD], dim=1), index_BW)
        self.tokens_BW = torch.cat([self.tokens_BW, tokens_BT], dim=1).gather(1, index_BW)


def _rows(x_BTD: Tensor, index_BW: Tensor) -> Tensor:
    """x[b, index[b, w]], [B, W, D]."""
    return x_BTD.gather(1, index_BW[..., None].expand(-1, -1, x_BTD.shape[-1]))
