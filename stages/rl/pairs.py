"""Pairs of replies as a model reads them: both in one row, behind one copy of the prompt.

    prompt | chosen EOS | rejected EOS

Each reply sees the prompt and itself, and its positions go on from the prompt's end, so a row says of each what it
would say of it alone (see micro_batch.py, which does the same for groups).

Legend: P pairs, one a row of W tokens; D model width; N reply tokens in all. [2, P]: chosen, then rejected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import kernels
from model.transformer import Transformer
from model.value import ValueModel
from stages.rl.preferences import Preference
from stages.rl.reward_model import Target, judged
from stages.tokens.bpe import Tokenizer
from stages.tokens.chat_template import render


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids. Each reply ends with the EOS."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """What one forward pass reads, and where in it the replies are."""

    tokens_PW: Tensor  # int64
    positions_PW: Tensor  # int64
    document_PW: Tensor  # int64, kernels.PREFIX for the prompt
    source_N: Tensor  # int64, which of the P·W states predicts the token
    targets_N: Tensor  # int64
    owner_N: Tensor  # int64, whose token it is: the pair, + P if the rejected reply's
    end_2P: Tensor  # int64, which of the P·W states has read the whole reply
    lengths_2P: Tensor  # int64, tokens of each reply


def pair_batch(pairs: Sequence[Pair], pad: int, device: torch.device | str = "cpu") -> PairBatch:
    """Lay out pairs, one a row, padded on the right."""
    width, n_pairs = max(map(len, pairs)), len(pairs)
    tokens_PW = torch.full((n_pairs, width), pad)
    positions_PW = torch.arange(width).repeat(n_pairs, 1)
    document_PW = torch.full((n_pairs, width), 2)  # padding, which nobody sees
    source: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    end_2P = torch.empty(2, n_pairs, dtype=torch.int64)
    for p, pair in enumerate(pairs):
        asked, start = len(pair.prompt), len(pair.prompt)
        tokens_PW[p, : len(pair)] = torch.tensor(pair.prompt + pair.chosen + pair.rejected)
        document_PW[p, :asked] = kernels.PREFIX
        for side, reply in enumerate((pair.chosen, pair.rejected)):
            stop = start + len(reply)
            positions_PW[p, start:stop] = torch.arange(asked, asked + len(reply))
            document_PW[p, start:stop] = side
            source += [p * width + asked - 1, *range(p * width + start, p * width + stop - 1)]
            targets += reply
            owner += [p + side * n_pairs] * len(reply)
            end_2P[side, p] = p * width + stop - 1
            start = stop
    lengths_2P = torch.tensor([[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]])
    laid_out = (tokens_PW, positions_PW, document_PW, *map(torch.tensor, (source, targets, owner)), end_2P, lengths_2P)
    return PairBatch(*(tensor.to(device) for tensor in laid_out))


def reply_logprobs(model: Transformer, batch: PairBatch) -> Tensor:
    """[2, P] fp32: log-probability of each whole reply, its EOS included. The head sees replies only."""
    hidden_PWD = model(batch.tokens_PW, batch.positions_PW, batch.document_PW).hidden_BTD
    hidden_ND = hidden_PWD.flatten(0, 1).index_select(0, batch.source_N)
    logprobs_N = kernels.linear_log_probs(hidden_ND, model.head_weight, batch.targets_N)
    sums = torch.zeros(batch.end_2P.numel(), device=logprobs_N.device).index_add(0, batch.owner_N, logprobs_N)
    return sums.view(batch.end_2P.shape)


def reply_values(model: ValueModel, batch: PairBatch) -> Tensor:
    """[2, P] fp32: the value at each reply's EOS."""
    return model(batch.tokens_PW, batch.positions_PW, batch.document_PW).flatten()[batch.end_2P]


def encode_pairs(
    preferences: Iterable[Preference], tokenizer: Tokenizer, max_tokens: int, target: Target = "response"
) -> list[Pair]:
    """The pairs whose prompt with either reply is at most `max_tokens` long, and whose judged parts differ."""
    pairs = []
    for preference in preferences:
        chosen, rejected = (judged(text, target) for text in (preference.chosen, preference.rejected))
        if chosen == rejected:
            continue
        prompt, chosen_ids = _split(*render(preference.reply(chosen), tokenizer))
        _, rejected_ids = _split(*render(preference.reply(rejected), tokenizer))
        if len(prompt) + max(len(chosen_ids), len(rejected_ids)) <= max_tokens:
            pairs.append(Pair(prompt, chosen_ids, rejected_ids))
    return pairs


def _split(ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the last turn up to its EOS)."""
    stop = start = len(mask) - mask[::-1].index(1)
    while mask[start - 1]:
        start -= 1
    return ids[:start], ids[start:stop]
