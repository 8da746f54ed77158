"""Choosing tokens: temperature, nucleus, and the rejection rule of speculative decoding (2211.17192).

Random numbers are drawn beforehand, one `draws_TU` a request, and a token is the quantile of its distribution at its
number. So which random number decides which token depends on the request and on the token's place in its reply alone:
neither the batch nor the acceptance of other rows changes a sample beyond rounding.

Letters: B rows, T places in the reply, U uses of a random number (SAMPLE and, with speculation, ACCEPT and DRAFT),
V vocabulary, M drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

N_USES = 3
SAMPLE, ACCEPT, DRAFT = range(N_USES)


class Sampler:
    """How every row of a batch draws: its temperature (0 is greedy), its nucleus and its random numbers."""

    def __init__(
        self, temperatures: Sequence[float], top_ps: Sequence[float], draws: Sequence[Tensor], device: torch.device
    ) -> None:
        self.greedy = all(temperature == 0 for temperature in temperatures)
        self.plain = all(temperature in (0, 1) for temperature in temperatures)
        self.greedy_B = torch.tensor([temperature == 0 for temperature in temperatures], device=device)
        self.some_greedy = 0 in temperatures
        self.temperature_B1 = torch.tensor([temperature or 1.0 for temperature in temperatures], device=device)[:, None]
        self.top_p_B1 = torch.tensor([max(top_p, 1e-6) for top_p in top_ps], device=device)[:, None]
        self.n_cut = sum(top_p < 1 for top_p in top_ps)
        self.draws_BTU = pad_sequence(list(draws), batch_first=True)

    def probabilities(self, logits_BTV: Tensor) -> Tensor:
        """softmax(logits / temperature), before the nucleus; of greedy rows at temperature 1."""
        return (logits_BTV if self.plain else logits_BTV / self.temperature_B1[:, None]).softmax(-1)

    def draws(self, place_B: Tensor, length: int, use: int) -> Tensor:
        """The random numbers of `length` places from `place_B` on, [B, length]; past a row's end, its last ones."""
        places_BT = place_B[:, None] + torch.arange(length, device=place_B.device)
        return self.draws_BTU[..., use].gather(1, places_BT.clamp_max(self.draws_BTU.shape[1] - 1))

    def choose(self, logits_BV: Tensor, place_B: Tensor) -> tuple[Tensor, Tensor]:
        """The token at `place_B` of each row's reply, and its log-probability (fp32) before the nucleus."""
        probabilities_BV = self.probabilities(logits_BV[:, None])[:, 0]
        if self.greedy:
            tokens_B = logits_BV.argmax(-1)
        else:
            tokens_B = self._sample(probabilities_BV, self.draws(place_B, 1, SAMPLE))
            if self.some_greedy:
                tokens_B = torch.where(self.greedy_B, logits_BV.argmax(-1), tokens_B)
        return tokens_B, probabilities_BV.gather(1, tokens_B[:, None]).squeeze(1).log()

    def draft(self, logits_BV: Tensor, place_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """A guess [B] at the token at `place_B`, and the distribution [B, V] it was drawn from (all greedy: None)."""
        if self.greedy:
            return logits_BV.argmax(-1), None
        guessed_BV = self._target(logits_BV[:, None])[:, 0]
        return invert(guessed_BV, self.draws(place_B, 1, DRAFT)), guessed_BV

    def verify(
        self, logits_BTV: Tensor, drafts_BM: Tensor, guessed_BMV: Tensor | None, place_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Accept drafts up to the first that fails, then draw one token more (2211.17192, algorithm 1).

        `logits_BTV` are the model's at the T = M + 1 places. Returns tokens [B, T], log-probabilities [B, T] and how
        many drafts were accepted [B]: the first accepted + 1 tokens count. They follow the model's own distribution
        whatever the drafts' was; greedy rows get their argmax.
        """
        if guessed_BMV is None:
            tokens_BT = logits_BTV.argmax(-1)
            accepted_BM = drafts_BM == tokens_BT[:, :-1]
        else:
            n_drafts = drafts_BM.shape[1]
            target_BTV = self._target(logits_BTV)
            likely_BM = target_BTV[:, :-1].gather(2, drafts_BM[..., None])[..., 0]
            guessed_BM = guessed_BMV.gather(2, drafts_BM[..., None])[..., 0]
            accepted_BM = self.draws(place_B, n_drafts, ACCEPT) * guessed_BM < likely_BM
            # Where a draft fails, what the target has above the guess; behind the last draft, the target itself.
            above_BMV = (target_BTV[:, :-1] - guessed_BMV).clamp_min_(0)
            some_BM1 = above_BMV.sum(-1, keepdim=True) > 0  # equal distributions fail no draft but by rounding
            rest_BMV = torch.where(some_BM1, above_BMV, target_BTV[:, :-1])
            rest_BTV = torch.cat([rest_BMV, target_BTV[:, -1:]], dim=1)
            drawn_BT = invert(rest_BTV, self.draws(place_B, n_drafts + 1, SAMPLE)[..., None])
            tokens_BT = torch.cat([torch.where(accepted_BM, drafts_BM, drawn_BT[:, :-1]), drawn_BT[:, -1:]], dim=1)
        n_accepted_B = accepted_BM.cumprod(1).sum(1)
        logprobs_BT = self.probabilities(logits_BTV).gather(2, tokens_BT[..., None])[..., 0].log()
        return tokens_BT, logprobs_BT, n_accepted_B

    def _sample(self, probabilities_BV: Tensor, draws_B1: Tensor) -> Tensor:
        if self.n_cut == 0:
            return sample(probabilities_BV, draws_B1)
        cut_B = sample(probabilities_BV, draws_B1, self.top_p_B1)
        if self.n_cut == len(cut_B):
            return cut_B
        # The same number finds another token when the vocabulary is sorted: whole rows must not depend on cut ones.
        return torch.where(self.top_p_B1[:, 0] < 1, cut_B, sample(probabilities_BV, draws_B1))

    def _target(self, logits_BTV: Tensor) -> Tensor:
        """What each row samples from, [B, T, V]: cut to the nucleus and normalised; greedy rows all at the argmax."""
        target_BTV = self.probabilities(logits_BTV)
        if self.n_cut:
            best_BTV, tokens_BTV = target_BTV.sort(dim=-1, descending=True)
            outside_BTV = best_BTV.cumsum(-1) - best_BTV >= self.top_p_B1[:, None]
            target_BTV = torch.zeros_like(target_BTV).scatter_(2, tokens_BTV, best_BTV.masked_fill(outside_BTV, 0))
            target_BTV /= target_BTV.sum(-1, keepdim=True)
        if self.some_greedy:
            best_BTV = torch.zeros_like(target_BTV).scatter_(2, logits_BTV.argmax(-1, keepdim=True), 1.0)
            target_BTV = torch.where(self.greedy_B[:, None, None], best_BTV, target_BTV)
        return target_BTV


def sample(probabilities_BV: Tensor, draws_B1: Tensor, top_p_B1: Tensor | None = None) -> Tensor:
    """Tokens [B] at the draws' (in [0, 1)) quantiles of each distribution, cut to its top-p nucleus and renormalised.

    The nucleus is the fewest most probable tokens whose probabilities reach top_p (1904.09751).
    """
    if top_p_B1 is None:
        return invert(probabilities_BV, draws_B1)
    n_tokens, n_vocabulary = 64, probabilities_BV.shape[1]
    while True:  # a full sort is dear and nuclei are small: look among the 64 best, then 8 times as many
        best_BK, tokens_BK = probabilities_BV.topk(min(n_tokens, n_vocabulary), dim=-1)
        mass_BK = best_BK.cumsum(-1)
        if n_tokens >= n_vocabulary or bool((mass_BK[:, -1:] >= top_p_B1).all()):
            break
        n_tokens *= 8
    inside_BK = mass_BK - best_BK < top_p_B1
    return tokens_BK.gather(1, invert(best_BK * inside_BK, draws_B1)[:, None]).squeeze(1)


def invert(weights_BV: Tensor, draws_B1: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds the draw's share of the total: never one of weight 0."""
    cumulative_BV = weights_BV.cumsum(-1)
    index_B1 = torch.searchsorted(cumulative_BV, draws_B1 * cumulative_BV[..., -1:], right=True)
    return index_B1.squeeze(-1).clamp_max(weights_BV.shape[-1] - 1)
